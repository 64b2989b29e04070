"""Which modules compute from their input and weights alone, so that what they computed can be kept, and what else they read."""

import operator
from collections.abc import Hashable, Iterator
from typing import Any

import torch.nn.functional as F
from diffusers.models import activations, attention, attention_processor, embeddings
from torch import Tensor, nn

from .provenance import AND_EXTRAS, owner_of, runs_own
from .replaced import LINEAR, SCORES, SDPA, Part, has_scores_of_its_own


class Same:
    """An object, equal to itself alone."""

    def __init__(self, known: object) -> None:
        self.known = known

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.known is self.known

    __hash__ = object.__hash__


class Installed:
    """What each subclass of ours is, beside the class of diffusers' or torch's that it stands in for (`replaces`)."""

    replaces: type


# without state of their own that a call reads
_STATELESS = {
    nn.Linear, nn.LayerNorm, nn.GELU, nn.ModuleList, nn.Sequential, nn.Identity, nn.ModuleDict, nn.ParameterDict,
    activations.GELU, attention.FeedForward, attention_processor.Attention, embeddings.MultiIPAdapterImageProjection,
    embeddings.ImageProjection, embeddings.IPAdapterFullImageProjection, embeddings.IPAdapterFaceIDImageProjection,
    embeddings.IPAdapterPlusImageProjection, embeddings.IPAdapterPlusImageProjectionBlock,
}  # fmt: skip
_PROCESSORS = (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0)
KNOWN = {*_STATELESS, *_PROCESSORS, nn.Dropout, embeddings.IPAdapterFaceIDPlusImageProjection}
"""The classes whose calls depend on nothing but their input, their weights and `attributes_of`."""

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


def stock_kind(kind: type) -> type:
    """The class that a class of ours stands in for; any other itself."""
    return kind.replaces if issubclass(kind, Installed) else kind


def replaced_functions(kind: type) -> Iterator[str]:
    """The functions that a call of this class runs and that are not its packages' own."""
    for name in ("forward", "__call__") if issubclass(kind, nn.Module) else ("__call__",):
        if not runs_own(kind, name, AND_EXTRAS):
            yield f"{owner_of(kind, name).__name__}.{name}"
    yield from (str(part) for part in _CALLED.get(kind, ()) if part.is_replaced())


def runs_own_functions(kind: type) -> bool:
    """Whether a class, or the one that it stands in for, runs its packages' own functions."""
    return next(replaced_functions(stock_kind(kind)), None) is None


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Parameters, then buffers."""
    yield from module._parameters.items()
    yield from module._buffers.items()


def is_known(module: Any, kind: type) -> bool:
    """Whether a module of this class computes from its input, its weights and `attributes_of` alone."""
    if not runs_own_functions(kind):
        return False
    if kind is attention_processor.Attention:
        processor = type(module.processor)
        return processor in _PROCESSORS and runs_own_functions(processor) and not has_scores_of_its_own(module)
    if kind is nn.Dropout:
        return module.p == 0 or not module.training
    if kind is embeddings.IPAdapterFaceIDPlusImageProjection:
        return type(module.clip_embeds) is Tensor and not module.clip_embeds.is_inference()
    if kind.__module__ == "peft.tuners.lora.layer" and kind.__name__ == "Linear":
        return not (module.lora_variant or any(module.use_dora.values()))
    return kind in _STATELESS


def attributes_of(module: Any) -> Hashable:
    """What a call reads from a module besides its weights, to be compared."""
    kind = type(module)
    if kind is attention_processor.Attention:
        return Same(module.processor), settings_of(module), has_scores_of_its_own(module)
    if kind is nn.Dropout:
        return module.p == 0 or not module.training
    if kind is embeddings.IPAdapterFaceIDPlusImageProjection:
        # its user sets them
        embeds = module.clip_embeds
        if type(embeds) is not Tensor:
            return None
        return Same(embeds), embeds._version, embeds.data_ptr(), module.shortcut, module.shortcut_scale
    if kind.__module__ == "peft.tuners.lora.layer":
        # merging edits a weight without a trace on it
        on = (tuple(module.merged_adapters), tuple(module.active_adapters), module.disable_adapters)
        return (bool(module.lora_variant), any(module.use_dora.values()), *on, *module.scaling.items())
    return None


settings_of = operator.attrgetter(
    "heads", "scale", "residual_connection", "rescale_output_factor", "norm_cross", "group_norm", "spatial_norm"
)
"""What a call reads from an Attention besides its projections."""
