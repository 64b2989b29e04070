"""UNets: the three IP-Adapter processors of diffusers 0.35.2 to 0.42.1 (`models/attention_processor.py`).

A processor is installed by changing its class to a subclass that adds no parameter: it stays the same object with the same
weights, and giving the class back undoes it. What a subclass cannot do exactly it hands to the class that it came from.

The subclasses have the names of the classes that they replace: diffusers looks for "IPAdapter", "Added" and "XFormers" in them,
its users print and compare them.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models import attention_processor as stock
from diffusers.models.attention_processor import Attention
from diffusers.models.unets import unet_2d_condition, unet_motion_model
from torch import nn

from ...ops.dispatch import automatic_reasons, layer_reasons
from .. import patching
from ..eligibility import foreign_reason
from ..replaced import replaced_reasons
from ..state import Layer, ModelContext, layer_of
from .fused import Fused, ours


class IPAdapterAttnProcessor(Fused, stock.IPAdapterAttnProcessor):  # type: ignore[misc]
    """In the place of the class that computes its scores by baddbmm."""

    replaces = stock.IPAdapterAttnProcessor


class IPAdapterAttnProcessor2_0(Fused, stock.IPAdapterAttnProcessor2_0):  # type: ignore[misc]
    """In the place of the class that every load of an IP-Adapter installs."""

    replaces = stock.IPAdapterAttnProcessor2_0

    eager_is_exact = True

    ignores_scale = True


class IPAdapterXFormersAttnProcessor(Fused, stock.IPAdapterXFormersAttnProcessor):  # type: ignore[misc]
    """In the place of the class that `enable_xformers_memory_efficient_attention` installs."""

    replaces = stock.IPAdapterXFormersAttnProcessor

    # it rounds them
    mask_refusal = (
        "ip_adapter_masks with xFormers: diffusers rounds them to float16 first; call "
        "disable_xformers_memory_efficient_attention()"
    )


FUSED: dict[type, Any] = {
    kind.replaces: kind for kind in (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
}
STOCK: dict[type, Any] = {ours: theirs for theirs, ours in FUSED.items()}

# `Attention.forward` asks for the signature in every call; a stored one is four times as fast to get
_signature: Any = inspect.signature(Fused.__call__)
# torch.compile cannot trace a mapping proxy once the UNet's keyword arguments were changed, as diffusers does for masks
_signature._parameters = dict(_signature._parameters)
Fused.__call__.__signature__ = _signature  # type: ignore[attr-defined]

# `set_default_attn_processor` compares exact classes with this registry, which is imported by name
for _module in (stock, unet_2d_condition, unet_motion_model):
    _known = tuple(FUSED[theirs] for theirs in _module.CROSS_ATTENTION_PROCESSORS if theirs in FUSED)
    _module.CROSS_ATTENTION_PROCESSORS += _known


def is_new(processor: Any, context: ModelContext) -> bool:
    """Whether a processor has yet to be installed for this UNet: a stock one, or one of another UNet's."""
    kind = type(processor)
    return kind in FUSED or (kind in STOCK and context_of(processor) is not context)


def context_of(processor: Any) -> ModelContext | None:
    """What a processor shares with the others of its UNet."""
    layer = layer_of(processor)
    return None if layer is None else layer.context


def install(processor: nn.Module, name: str, context: ModelContext, undo: list[Callable[[], None]]) -> None:
    """Install a processor for the UNet of this context; `undo` gets what reverts that, before anything is changed."""
    kind = type(processor)
    patching.install(processor, FUSED.get(kind, kind), context, undo, Layer(name, context))


def uninstall(processor: nn.Module) -> None:
    """Make a processor of ours a stock one again."""
    kind = type(processor)
    patching.uninstall(processor, STOCK.get(kind, kind))


def layer_plan(
    attn: Attention, processor: object, impl: str, device: torch.device, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """("triton", "eager" or "stock", why not the kernel) for a layer, as far as it is known before there are inputs."""
    foreign = foreign_reason(processor, expected=True)
    if foreign is not None:
        return "stock", [foreign]
    installed = ours(processor)
    kind = type(processor) if installed is None else STOCK[installed]
    replaced = replaced_reasons(kind, attn, masked=False)
    if replaced:
        return "stock", replaced
    fallback = "eager" if FUSED[kind].eager_is_exact else "stock"
    if impl == "eager":
        return fallback, ['impl="eager"']
    reasons = layer_reasons(device, dtype, attn.inner_dim // attn.heads)
    if impl == "auto":
        reasons += automatic_reasons(device, dtype)
    return (fallback, reasons) if reasons else ("triton", [])


Fused.plan = staticmethod(layer_plan)
