"""What a UNet projects before its layers: image tokens (`MultiIPAdapterImageProjection`), and the text of Kolors.

Both are installed like the processors, by class, and remember their output for as long as their input lives. The subclasses
have the names of what they replace; a copy or a pickle is diffusers' or torch's own.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models import activations, attention, attention_processor, embeddings
from torch import Tensor, nn

from . import patching
from .conditioning_cache import active, get_or_compute
from .guards import State, doubt_of, state_of
from .provenance import AND_EXTRAS, owner_of, runs_own
from .replaced import LINEAR, SCORES, SDPA, Part, has_scores_of_its_own
from .state import ModelContext

# without state of their own that a call reads
_STATELESS = {
    nn.Linear, nn.LayerNorm, nn.GELU, nn.ModuleList, nn.Sequential, nn.Identity, nn.ModuleDict, nn.ParameterDict,
    activations.GELU, attention.FeedForward, attention_processor.Attention,
    embeddings.ImageProjection, embeddings.IPAdapterFullImageProjection, embeddings.IPAdapterFaceIDImageProjection,
    embeddings.IPAdapterPlusImageProjection, embeddings.IPAdapterPlusImageProjectionBlock,
}  # fmt: skip


_PROCESSORS = (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0)
# what a class calls beside its modules
_CALLED: dict[type, tuple[Part, ...]] = {
    nn.Linear: (LINEAR,),
    nn.LayerNorm: (Part.of(F, "layer_norm"),),
    nn.GELU: (Part.of(F, "gelu"),),
    activations.GELU: (Part.of(F, "gelu"),),
    nn.Dropout: (Part.of(F, "dropout"),),
    attention_processor.AttnProcessor: SCORES,
    attention_processor.AttnProcessor2_0: (SDPA,),
}


def _replaced(kind: type) -> Iterator[str]:
    """The functions that a call of this class runs and that are not its packages' own."""
    for name in ("forward", "__call__") if issubclass(kind, nn.Module) else ("__call__",):
        if not runs_own(kind, name, AND_EXTRAS):
            yield f"{owner_of(kind, name).__name__}.{name}"
    yield from (str(part) for part in _CALLED.get(kind, ()) if part.is_replaced())


def _is_own(kind: type) -> bool:
    return next(_replaced(kind), None) is None


def known(module: nn.Module) -> State | None:
    """What a module's call reads besides its parameters; None for a kind that is not known, or whose functions are replaced."""
    kind = type(module)
    if not _is_own(kind):
        return None
    if kind is attention_processor.Attention:
        processor = type(module.processor)
        is_plain = processor in _PROCESSORS and _is_own(processor) and not has_scores_of_its_own(module)
        return State((processor.__name__,)) if is_plain else None
    if kind in _STATELESS:
        return State()
    if kind is nn.Dropout:
        return State() if module.p == 0 or not module.training else None
    if kind is embeddings.IPAdapterFaceIDPlusImageProjection:
        return _face_state(module)
    if kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Linear":
        return _lora_state(module)
    return None


def _face_state(module: Any) -> State | None:
    """FaceID Plus reads attributes that its user sets."""
    embeds = module.clip_embeds
    if type(embeds) is not Tensor or embeds.is_inference():
        return None
    marks = (id(embeds), embeds._version, embeds.data_ptr(), module.shortcut, module.shortcut_scale)
    return State(marks, (embeds,))


def _lora_state(module: Any) -> State | None:
    """Which LoRAs are merged, active and on, and how strongly. Merging edits a weight without a trace on it."""
    if module.lora_variant or any(module.use_dora.values()):
        return None
    on = (tuple(module.merged_adapters), tuple(module.active_adapters), module.disable_adapters)
    return State((*on, *module.scaling.items()))


def pure_state(*modules: nn.Module) -> State | None:
    """The state of projections; None where their output may depend on more than is known."""
    return state_of(modules, known)


def doubt(*modules: nn.Module) -> str:
    """Why `pure_state` is None."""
    return doubt_of(modules, known)


class _Cached(nn.Module):
    """What both subclasses share."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return object.__new__, (STOCK[type(self)],), vars(self)


class MultiIPAdapterImageProjection(_Cached, embeddings.MultiIPAdapterImageProjection):  # type: ignore[misc]
    """In the place of the class that projects the image embeddings of every adapter, in every step."""

    def forward(self, image_embeds: Any) -> list[Tensor]:
        """[batch, images, ...] per adapter to image tokens [batch, images, tokens, channels] per adapter."""
        layers: Any = self.image_projection_layers
        fits = isinstance(image_embeds, list) and len(image_embeds) == len(layers)
        if active() is None or not fits or not _is_own(embeddings.MultiIPAdapterImageProjection):
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

    return get_or_compute(
        embeds, (id(layer), "tokens"), lambda: pure_state(layer), project, lambda: f"encoder_hid_proj: {doubt(layer)}"
    )


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
        return get_or_compute(tokens, ("repeat", repeats, dim, output_size), State, repeat)


class Linear(_Cached, nn.Linear):
    """In the place of Kolors' projection of the text."""

    def forward(self, input: Tensor) -> Tensor:
        """As `torch.nn.Linear`."""
        forward = super().forward
        own = (self,), _known_or_ours
        return get_or_compute(input, (id(self), "text"), lambda: state_of(*own), lambda: forward(input), lambda: doubt_of(*own))


OURS: dict[type, Any] = {
    embeddings.MultiIPAdapterImageProjection: MultiIPAdapterImageProjection,
    nn.Linear: Linear,
}
STOCK: dict[type, Any] = {ours: theirs for theirs, ours in OURS.items()}

_KNOWN = {*_STATELESS, *STOCK.values(), *_PROCESSORS, nn.Dropout, embeddings.IPAdapterFaceIDPlusImageProjection}


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


def state_with_ours(modules: list[nn.Module]) -> State | None:
    """`pure_state` of modules among which are projections that were installed."""
    return state_of(modules, _known_or_ours)


def _known_or_ours(module: nn.Module) -> State | None:
    theirs = STOCK.get(type(module))
    if theirs is None:
        return known(module)
    return State() if _is_own(theirs) else None


def unkept_reasons(unet: nn.Module) -> list[str]:
    """Which functions that compute what would be remembered are replaced; empty where none is."""
    kinds: dict[type, None] = {nn.Linear: None}
    for root in of(unet):
        for module in root.modules():
            kinds[STOCK.get(type(module), type(module))] = None
            if isinstance(module, attention_processor.Attention):
                kinds[type(module.processor)] = None
    places = dict.fromkeys(place for kind in kinds if kind in _KNOWN for place in _replaced(kind))
    return [
        f"{place}: replaced by a function that is not torch's or diffusers' own, so what it computes is not kept; undo that to "
        "have it kept"
        for place in places
    ]
