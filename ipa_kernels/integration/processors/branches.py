"""From what a processor is called with to the branches of its attention: projected, in stock's order and shapes."""

from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...ops.dispatch import layer_reasons
from ...ops.validation import Problem, check_arguments
from ...report import plural
from ..conditioning_cache import Keeper
from ..guards import LayerGuard, ModuleGuard, number
from ..state import Layer


class Keeps(NamedTuple):
    """Where a call keeps what it computes, and what it computes with."""

    keeper: Keeper
    guard: LayerGuard


def problem_of(
    layer: Layer,
    processor: Any,
    attn: Attention,
    query: Tensor,
    inputs: tuple[Tensor, list[Tensor], Any],
    softmax_scale: float | None,
    runs_kernel: Callable[[Tensor], bool],
    keeps: Keeps | None = None,
) -> Problem:
    """For eager calls: an adapter of scale 0 is left out, its projections are not run.

    query: [B, M, H·D]; inputs: text, image tokens and masks; runs_kernel: whether the kernel is what runs such states; keeps:
    None where nothing is kept.
    """
    text, images, masks = inputs
    guards = None if keeps is None else keeps.guard.text
    key, value = keys_and_values(layer, attn, text, "text", (attn.to_k, attn.to_v), guards, keeps, runs_kernel)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    scales: list[float] = []
    vectors: list[Tensor | None] = []
    adapters = zip(images, processor.scale, of_adapters(masks, len(images)), strict=True)
    for adapter, (state, scale, mask) in enumerate(adapters):
        if all(s == 0 for s in scale) if isinstance(scale, list) else scale == 0:
            continue
        modules = processor.to_k_ip[adapter], processor.to_v_ip[adapter]
        guards = None if keeps is None else keeps.guard.images[adapter]
        # all images of an unmasked adapter share one softmax
        for i in range(1 if mask is None else mask.shape[1]):
            use = (adapter, None if mask is None else i)
            image_key, image_value = keys_and_values(layer, attn, state, use, modules, guards, keeps, runs_kernel)
            keys.append(image_key)
            values.append(image_value)
            scales.append(factor(scale[i] if isinstance(scale, list) else scale, query.dtype, query.device))
            vectors.append(None if mask is None else _mask_vector(mask, i, query, keeps))
    return check_arguments(split(query, attn.heads), key, value, keys, values, scales, vectors, None, softmax_scale)


def factor(scale: Any, dtype: torch.dtype, device: torch.device) -> float:
    """What stock's product of a scale and a tensor of this dtype multiplies by: on a CPU torch rounds a tensor to it first."""
    if isinstance(scale, Tensor) and device.type == "cpu":
        scale = scale.to(dtype)
    return float(scale)


def of_adapters(masks: list[Any] | None, adapters: int) -> list[Any]:
    """A mask [1 or B, images, height, width] or None for each adapter."""
    return masks or [None] * adapters


def split(projected: Tensor, heads: int) -> Tensor:
    """[B, N, H·D] to [B, H, N, D]."""
    return projected.view(projected.shape[0], -1, heads, projected.shape[-1] // heads).transpose(1, 2)


def keys_and_values(
    layer: Layer,
    attn: Attention,
    states: Tensor,
    use: Any,
    modules: tuple[nn.Module, nn.Module],
    guards: tuple[ModuleGuard, ModuleGuard] | None,
    keeps: Keeps | None,
    runs_kernel: Callable[[Tensor], bool],
) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] each, of the text (`use` "text") or of an adapter's images, one or all: (adapter, image or None).

    modules: to_k and to_v; guards: theirs; keeps: None where nothing is kept.
    """
    to_k, to_v = modules

    def project() -> tuple[Tensor, Tensor]:
        rows = states
        if states.shape[0] > 1 and states.stride(0) == 0:
            # the same row over and over; in eager attention a product of fewer rows may differ in its last bits
            rows = states[:1] if runs_kernel(states) else states

        def tokens() -> Tensor:
            return rows if use == "text" or use[1] is None else rows[:, use[1]]

        # like stock, once for each: autograd then sums their gradients in stock's order
        return split(to_k(tokens()), attn.heads), split(to_v(tokens()), attn.heads)

    if guards is None or keeps is None:
        return project()
    return keeps.keeper.get_or_compute(states, (layer, use, attn.heads), guards, project, layer.name)


def all_keys_and_values(
    layer: Layer,
    processor: Any,
    attn: Attention,
    text: Tensor,
    images: list[Tensor],
    counts: list[int | None],
    keeps: Keeps | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every branch, as `keys_and_values`: the text, then of each adapter all images at once, or one by one where counted."""
    guards = None if keeps is None else keeps.guard.text
    yield keys_and_values(layer, attn, text, "text", (attn.to_k, attn.to_v), guards, keeps, lambda states: False)
    for adapter, (state, count) in enumerate(zip(images, counts, strict=True)):
        modules = processor.to_k_ip[adapter], processor.to_v_ip[adapter]
        guards = None if keeps is None else keeps.guard.images[adapter]
        for i in (None,) if count is None else range(count):
            yield keys_and_values(layer, attn, state, (adapter, i), modules, guards, keeps, lambda states: False)


def _mask_vector(mask: Tensor, i: int, query: Tensor, keeps: Keeps | None) -> Tensor:
    """[B or 1, M] for image i, in the dtype that stock rounds it to."""
    queries, dtype, device = query.shape[1], query.dtype, query.device

    def vector() -> Tensor:
        return resized(mask, i, queries).to(dtype=dtype, device=device)

    if keeps is None:
        return vector()
    return keeps.keeper.get_or_compute(mask, ("mask", i, queries, dtype, device), (), vector)


def resized(mask: Tensor, image: int, queries: int) -> Tensor:
    """[B or 1, M]: one channel of the mask that stock multiplies with."""
    return IPAdapterMaskProcessor.downsample(mask[:, image], mask.shape[0], queries, 1)[..., 0].contiguous()  # type: ignore[no-any-return]


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


def mask_reasons(kind: Any, masks: Any) -> list[str]:
    """Why masks are for the replaced class alone."""
    return [kind.mask_refusal] if masks is not None and kind.mask_refusal else []


def softmax_scale(kind: Any, attn: Attention) -> float | None:
    """The factor of the scores; None is 1/sqrt(head dim), which a class that ignores attn.scale takes."""
    return None if kind.ignores_scale else float(attn.scale)


def cannot(layer: Layer, attn: Attention, hidden_states: Tensor, reasons: list[str]) -> str:
    """The message of an `UnsupportedError`."""
    reasons = reasons + layer_reasons(hidden_states.device, hidden_states.dtype, attn.inner_dim // attn.heads)
    # sizes are tensors while torch.jit traces
    shape = "of any shape" if torch.jit.is_tracing() else list(hidden_states.shape)  # type: ignore[no-untyped-call]
    saw = f"hidden_states {shape}, {hidden_states.dtype}, {hidden_states.device}"
    return f'{layer.name}: impl="triton" cannot run {saw}: ' + "; ".join(reasons)


def merge(out: Tensor) -> Tensor:
    """[B, H, M, D] to [B, M, H·D]."""
    return out.transpose(1, 2).reshape(out.shape[0], out.shape[2], -1)
