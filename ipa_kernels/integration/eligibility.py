"""Why a layer, or one of its calls, is for diffusers' own code: each reason in one line, with what to do to use the kernel."""

from numbers import Integral, Real
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
    IPAdapterXFormersAttnProcessor,
)
from torch import Tensor

from ..report import plural
from .guards import number
from .known_modules import Installed

ADAPTERS = (IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0, IPAdapterXFormersAttnProcessor)
"""diffusers' IP-Adapter processors for UNets."""


def stock_reasons(
    processor: Any, attn: Attention, hidden_states: Tensor, states: Any, attention_mask: Tensor | None, masks: Any, scales: Any
) -> list[str]:
    """Why only the replaced class may run a call; every check is one that costs nothing.

    scales: of the processor; for a graph one None for each adapter, since a value that is looked at is compiled in.
    """
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call]
        # sizes are tensors here: nothing is compared
        return ["torch.jit.trace: diffusers' own code is traced, the kernel is not; use torch.compile to have it in a graph"]
    reasons = _attention_reasons(attn)
    if attention_mask is not None:
        reasons.append(
            "attention_mask: only diffusers' own code takes one; leave encoder_attention_mask out if nothing is masked"
        )
    if hidden_states.ndim != 3:
        reasons.append(f"hidden_states: expected [batch, queries, channels], got {hidden_states.ndim} dimensions; reshape them")
    if not _is_pair(states):
        pair = "pass images as added_cond_kwargs={'image_embeds': [...]} of the UNet"
        return [
            *reasons,
            f"encoder_hidden_states: expected a pair of text and a list of image tokens, got another form; {pair}",
        ]
    text, images = states
    if len(images) != len(processor.to_k_ip) or not isinstance(scales, list) or len(scales) != len(images):
        adapters = len(processor.to_k_ip)
        count = f"got {len(images)} for {adapters} adapter{plural(adapters)} with scales {scales}"
        return [*reasons, f"image inputs: {count}; give each adapter one image input and one scale"]
    if any(state.ndim not in (3, 4) for state in images):
        reasons.append("image tokens: not three or four dimensions; pass [batch, images, tokens, channels]")
    batches = [hidden_states.shape[0], text.shape[0], *(state.shape[0] for state in images)]
    if len(set(batches)) > 1:
        got = f"expected the same, got {batches}"
        todo = "cut all of them where a callback cuts one, and call the pipeline once per prompt where each has a reference"
        reasons.append(f"batch sizes of queries, text and images: {got}; {todo}")
    reasons += _mask_reasons(scales, masks, images, hidden_states.shape[0])
    return reasons


def _mask_reasons(scales: list[Any], masks: Any, images: list[Tensor], batch: int) -> list[str]:
    """Masks or scales for which diffusers raises, or that it broadcasts in its own way."""
    if masks is None:
        masks = [None] * len(images)
    elif not isinstance(masks, list) or len(masks) != len(images):
        came = f"a list of {len(masks)} for {len(images)}" if isinstance(masks, list) else type(masks).__name__
        return [
            f"ip_adapter_masks: expected a list with an entry for each adapter, got {came}, which is left to diffusers' "
            "own code; pass such a list"
        ]
    for scale, mask, state in zip(scales, masks, images, strict=True):
        if scale is not None:
            other = [one for one in (scale if isinstance(scale, list) else [scale]) if number(one) is None]
            if other:
                return [f"adapter scale: got {_described(other[0])}; set a number, or a list of numbers"]
        if mask is None:
            if isinstance(scale, list) and any(s != 0 for s in scale):
                return ["adapter scales per image: only images with masks have a scale each; pass masks, or set one scale"]
            continue
        if not isinstance(mask, Tensor) or mask.ndim != 4 or state.ndim != 4 or mask.shape[1] != state.shape[1]:
            form = "[1, images, height, width]"
            return [f"ip_adapter_masks: an entry is no tensor {form} with a mask for each image; pass one for each adapter"]
        if mask.shape[0] not in (1, batch) or (isinstance(scale, list) and len(scale) != mask.shape[1]):
            got = f"got {list(mask.shape)} for a batch of {batch} with scale {scale!r}"
            return [f"ip_adapter_masks: {got}; pass one row, or one for each row of the batch, and a scale per image"]
    return []


def _described(scale: Any) -> str:
    """A scale that is no number, without its value where that would have to be waited for."""
    if not isinstance(scale, Tensor):
        return repr(scale)
    gradient = " that requires grad" if scale.requires_grad else ""
    return f"a tensor {list(scale.shape)}{gradient}, {scale.dtype}, on {scale.device}"


def _attention_reasons(attn: Attention) -> list[str]:
    """Parts of an Attention that no UNet with an IP-Adapter has, and that only the replaced class honours."""
    factor = attn.rescale_output_factor
    parts = {
        # what is no number may be written to, or be one for each channel
        "heads that are no whole number": not isinstance(attn.heads, Integral),
        "spatial_norm": attn.spatial_norm is not None,
        "group_norm": attn.group_norm is not None,
        "norm_cross": bool(attn.norm_cross),
        "residual_connection": bool(attn.residual_connection),
        "rescale_output_factor": not (isinstance(factor, Real) and factor == 1),
    }
    return [f"attention with {part}: only diffusers' own code honours it" for part, there in parts.items() if there]


def _is_pair(states: Any) -> bool:
    """Whether this is (text, [image tokens, ...]), which is what a UNet with an IP-Adapter passes."""
    return (
        isinstance(states, tuple)
        and len(states) == 2
        and isinstance(states[0], Tensor)
        and states[0].ndim == 3
        and isinstance(states[1], list | tuple)
        and all(isinstance(state, Tensor) for state in states[1])
    )


def is_adapter(processor: object) -> bool:
    """Whether a processor is one of an IP-Adapter: of diffusers' for UNets, derived from one, or from elsewhere."""
    return isinstance(processor, ADAPTERS) or _is_from_elsewhere(processor)


def _is_from_elsewhere(processor: object) -> bool:
    """Whether a processor does the work of an IP-Adapter's, as tencent's and InstantID's do, and is not diffusers'.

    Told by the names that their many copies share.
    """
    kind = type(processor)
    if kind.__module__.startswith("diffusers.") or isinstance(processor, Installed):
        return False
    named = "IPAttn" in kind.__name__ or "IPAdapter" in kind.__name__
    return named or (hasattr(processor, "to_k_ip") and hasattr(processor, "to_v_ip"))


def expects_adapter(name: str) -> bool:
    """Whether diffusers' loader puts an IP-Adapter into the attention of this name."""
    return not name.endswith("attn1") and "motion_modules" not in name


def foreign_reason(processor: object, expected: bool) -> str | None:
    """Why a processor is not installed, or None where it can be, or where no IP-Adapter's is expected."""
    kind = type(processor)
    if kind in ADAPTERS or isinstance(processor, Installed) or not (expected or is_adapter(processor)):
        return None
    load = "load the adapter by load_ip_adapter, or set_attn_processor with diffusers' own"
    return f"processor {kind.__name__}: not one of diffusers' IP-Adapter classes, the only ones supported; {load}"
