"""What a UNet projects before its layers: image tokens (`MultiIPAdapterImageProjection`), and the text of Kolors.

Both are installed like the processors, by class, and remember their output for as long as their input lives. The subclasses
have the names of what they replace; a copy or a pickle is diffusers' or torch's own.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_processor, embeddings
from torch import Tensor, nn

from . import patching
from .known_modules import KNOWN, Installed, replaced_functions, runs_own_functions, stock_kind
from .running_step import THREAD, keeper
from .state import ModelContext


class _Cached(Installed, nn.Module):
    """What both subclasses share."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (self.replaces,), vars(self)


class MultiIPAdapterImageProjection(_Cached, embeddings.MultiIPAdapterImageProjection):  # type: ignore[misc]
    """In the place of the class that projects the image embeddings of every adapter, in every step."""

    replaces = embeddings.MultiIPAdapterImageProjection

    def forward(self, image_embeds: Any) -> list[Tensor]:
        """[batch, images, ...] per adapter to image tokens [batch, images, tokens, channels] per adapter."""
        layers: Any = self.image_projection_layers
        fits = isinstance(image_embeds, list) and len(image_embeds) == len(layers)
        if THREAD.step is None or torch.compiler.is_compiling() or not fits or not runs_own_functions(self.replaces):
            return super().forward(image_embeds)  # type: ignore[no-any-return]
        return [_tokens(embeds, layer) for embeds, layer in zip(image_embeds, layers, strict=True)]


def _tokens(embeds: Tensor, layer: nn.Module) -> Tensor:
    """One adapter's share of what the replaced class does: [batch, images, ...] to [batch, images, tokens, channels]."""

    def project() -> Tensor:
        batch, images = embeds.shape[0], embeds.shape[1]
        tokens: Tensor = layer(embeds.reshape((batch * images,) + embeds.shape[2:]))
        tokens = tokens.reshape((batch, images) + tokens.shape[1:])
        tokens.repeat_interleave = _Repeated(tokens)  # type: ignore[method-assign, assignment]
        return tokens

    return _kept(embeds, "tokens", layer, project, "encoder_hid_proj")


def _kept(source: Tensor, key: object, module: nn.Module | None, compute: Callable[[], Tensor], place: str = "") -> Tensor:
    """`compute()`, or what a module computed from the same tensor."""
    step, keeps = THREAD.step, keeper(source.device.type)
    if step is None or keeps is None:
        return compute()
    guards = () if module is None else (step.context.guard(module),)
    return keeps.get_or_compute(source, (id(module), key), guards, compute, place)


class _Repeated:
    """The method `repeat_interleave` of image tokens: UNetMotionModel repeats them for its frames, in every step."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = weakref.ref(tokens)

    def __call__(self, repeats: Any, dim: int | None = None, *, output_size: int | None = None) -> Tensor:
        tokens = self.tokens()
        assert tokens is not None  # it is what this was called on

        def repeat() -> Tensor:
            return torch.repeat_interleave(tokens, repeats, dim=dim, output_size=output_size)

        if not isinstance(repeats, int):
            return repeat()
        return _kept(tokens, ("repeat", repeats, dim, output_size), None, repeat)


class Linear(_Cached, nn.Linear):
    """In the place of Kolors' projection of the text."""

    replaces = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear`."""
        forward = super().forward
        return _kept(input, "text", self, lambda: forward(input), "text_encoder_hid_proj")


OURS: dict[type, Any] = {kind.replaces: kind for kind in (MultiIPAdapterImageProjection, Linear)}
STOCK: dict[type, Any] = {ours: theirs for theirs, ours in OURS.items()}


def of(unet: nn.Module) -> list[nn.Module]:
    """The projections of a UNet that work for an IP-Adapter."""
    modules = unet._modules
    if not isinstance(modules.get("encoder_hid_proj"), embeddings.MultiIPAdapterImageProjection):
        return []
    found = (modules.get(place) for place in ("encoder_hid_proj", "text_encoder_hid_proj"))
    return [module for module in found if type(module) in OURS or type(module) in STOCK]  # type: ignore[misc]


def install(module: nn.Module, context: ModelContext, undo: list[Callable[[], None]]) -> None:
    """Make a projection one of ours; `undo` gets what reverts that, before anything is changed."""
    patching.install(module, OURS[type(module)], context, undo)


def uninstall(module: nn.Module) -> None:
    """Make a projection of ours the one that it was."""
    patching.uninstall(module, STOCK[type(module)])


def unkept_reasons(unet: nn.Module) -> list[str]:
    """Which functions that compute what would be remembered are replaced; empty where none is."""
    kinds: dict[type, None] = {nn.Linear: None}
    for root in of(unet):
        for module in root.modules():
            kinds[stock_kind(type(module))] = None
            if isinstance(module, attention_processor.Attention):
                kinds[type(module.processor)] = None
    places = dict.fromkeys(place for kind in kinds if kind in KNOWN for place in replaced_functions(kind))
    return [
        f"{place}: replaced by a function that is not torch's or diffusers' own, so what it computes is not kept; undo that to "
        "have it kept"
        for place in places
    ]
