"""Which image, scale and mask belongs to which adapter: the order of the options says it. Needs nothing but Python."""

from dataclasses import dataclass, field

from .arguments import SCALE
from .errors import UserError


@dataclass
class Adapter:
    """One --ip-adapter, and the options that belong to it in their order; path None: none was named.

    early: the options that came before it.
    """

    path: str | None = None
    weights: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    early: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"--ip-adapter {self.path}" if self.path else "the IP-Adapter"

    @property
    def name(self) -> str:
        """The path; without one the small pipeline's default."""
        return self.path or "base"

    @property
    def weight(self) -> str | None:
        """The weight file, where one was named."""
        return self.weights[0] if self.weights else None

    @property
    def scale(self) -> float | list[float]:
        """What `set_ip_adapter_scale` takes for this adapter: one number, or one per image."""
        return self.scales if len(self.scales) > 1 else self.scales[0] if self.scales else SCALE


def check_adapters(adapters: list[Adapter]) -> None:
    """Raises UserError unless every option belongs to one adapter, and every adapter has what it needs."""
    several = len(adapters) > 1
    if several and adapters[0].early:
        first = f"comes before the first of {len(adapters)} --ip-adapter"
        raise UserError(f"{adapters[0].early[0]}: {first}; what belongs to one of them follows it")
    for adapter in adapters:
        images, masks, scales = len(adapter.images), len(adapter.masks), len(adapter.scales)
        if len(adapter.weights) > 1:
            given = f"--ip-adapter-weight: {len(adapter.weights)} given for {adapter}"
            raise UserError(f"{given}: needs one; a second adapter is a second --ip-adapter")
        if not images:
            own = "; each of several adapters is followed by images of its own" if several else ""
            raise UserError(f"--image: none given for {adapter}{own}")
        if masks not in (0, images):
            one_each = "needs one per image, in the order of the images (all white: everywhere)"
            raise UserError(f"--mask: {masks} given for {adapter}, {images} for --image: {one_each}")
        if scales > 1 and not masks:
            raise UserError(f"--scale: {scales} given for {adapter}: needs one; only images with a --mask have a scale each")
        if scales > 1 and scales != images:
            raise UserError(f"--scale: {scales} given for {adapter}, {images} for --image: needs one for all or one per image")
