"""From what a processor is called with to the branches of its attention: projected, in stock's order and shapes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...ops import UnsupportedError
from ...ops.validation import Problem, check_arguments
from ..guards import LayerGuard, ModuleGuard
from ..running_step import get_or_compute
from ..state import Layer


def problem(
    layer: Layer,
    processor: Any,
    attn: Attention,
    query: Tensor,
    inputs: tuple[Tensor, list[Tensor], Any],
    softmax_scale: float | None,
    guard: LayerGuard | None,
    runs_kernel: Callable[[Tensor], bool],
) -> Problem:
    """For eager calls: an adapter of scale 0 is left out, its projections are not run.

    query: [B, M, H·D]; inputs: text, image tokens and masks; guard: None where nothing is kept; runs_kernel: whether the kernel
    is what runs such states.
    """
    text, images, masks = inputs
    guards = None if guard is None else guard.text
    key, value = keys_and_values(layer, attn, text, "text", (attn.to_k, attn.to_v), guards, runs_kernel)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    scales: list[float] = []
    vectors: list[Tensor | None] = []
    adapters = zip(images, processor.scale, of_adapters(masks, len(images)), strict=True)
    for adapter, (state, scale, mask) in enumerate(adapters):
        if all(s == 0 for s in scale) if isinstance(scale, list) else scale == 0:
            continue
        modules = processor.to_k_ip[adapter], processor.to_v_ip[adapter]
        guards = None if guard is None else guard.images[adapter]
        # all images of an unmasked adapter share one softmax
        for i in range(1 if mask is None else mask.shape[1]):
            use = (adapter, None if mask is None else i)
            image_key, image_value = keys_and_values(layer, attn, state, use, modules, guards, runs_kernel)
            keys.append(image_key)
            values.append(image_value)
            scales.append(factor(scale[i] if isinstance(scale, list) else scale, query.dtype, query.device))
            vectors.append(None if mask is None else _mask_vector(mask, i, query))
    return check_arguments(_split(query, attn.heads), key, value, keys, values, scales, vectors, None, softmax_scale)


def graph_problem(
    layer: Layer,
    processor: Any,
    attn: Attention,
    query: Tensor,
    inputs: tuple[Tensor, list[Tensor], Any],
    softmax_scale: float | None,
) -> Problem:
    """For a call that a compiler or a CUDA graph records, to be run with other data: scales are a tensor, none is left out.

    What was prepared for the step is read from where it is refilled (`static_storage`); else it is projected in the graph.
    """
    text, images, masks = inputs
    masks = of_adapters(masks, len(images))
    counts = image_counts(masks)
    scales = layer.table.branches(counts)
    static = layer.static if layer.context.is_prepared else None
    if static is not None:
        vectors = static.vectors.get(query.shape[1])
        if vectors is not None:
            keys = [_split(key, attn.heads) for key in static.keys]
            values = [_split(value, attn.heads) for value in static.values]
            return _checked(query, attn, keys, values, scales, vectors, softmax_scale)
    if not torch.compiler.is_compiling() and any(mask is not None for mask in masks):
        raise UnsupportedError(
            f"ip_adapter_masks: none were prepared for {query.shape[1]} queries, and a graph reads no others"
        )
    branches = list(projections(processor, attn, text, images, counts))
    keys = [_split(to_k(tokens), attn.heads) for tokens, to_k, _ in branches]
    values = [_split(to_v(tokens), attn.heads) for tokens, _, to_v in branches]
    return _checked(
        query, attn, keys, values, scales, mask_vectors(masks, query.shape[1], query.dtype, query.device), softmax_scale
    )


def factor(scale: Any, dtype: torch.dtype, device: torch.device) -> float:
    """What stock's product of a scale and a tensor of this dtype multiplies by: on a CPU torch rounds a tensor to it first."""
    if isinstance(scale, Tensor) and device.type == "cpu":
        scale = scale.to(dtype)
    return float(scale)


def of_adapters(masks: list[Any] | None, adapters: int) -> list[Any]:
    """A mask [1 or B, images, height, width] or None for each adapter."""
    return masks or [None] * adapters


def image_counts(masks: list[Any]) -> list[int | None]:
    """The images of each mask; None where there is none, and all images of the adapter share one softmax."""
    return [None if mask is None else mask.shape[1] for mask in masks]


def projections(
    processor: Any, attn: Attention, text: Tensor, images: list[Tensor], counts: list[int | None]
) -> Iterator[tuple[Tensor, nn.Module, nn.Module]]:
    """(tokens, to_k, to_v) of each branch: the text, then of each adapter all images at once, or one by one where counted."""
    yield text, attn.to_k, attn.to_v
    for state, to_k, to_v, count in zip(images, processor.to_k_ip, processor.to_v_ip, counts, strict=True):
        if count is None:
            yield state, to_k, to_v
        else:
            for i in range(count):
                yield state[:, i], to_k, to_v


def mask_vectors(masks: list[Any], queries: int, dtype: torch.dtype, device: torch.device) -> list[Tensor | None]:
    """[B or 1, M] or None for each image branch of `projections`."""
    vectors: list[Tensor | None] = []
    for mask in masks:
        for i in range(1 if mask is None else mask.shape[1]):
            vectors.append(None if mask is None else torch.ops.ipa_kernels.mask_vector(mask, i, queries).to(device, dtype))
    return vectors


def _checked(
    query: Tensor,
    attn: Attention,
    keys: list[Tensor],
    values: list[Tensor],
    scales: Tensor,
    vectors: list[Tensor | None],
    softmax_scale: float | None,
) -> Problem:
    (key, *image_keys), (value, *image_values) = keys, values
    if scales.device != query.device:
        scales = scales.to(query.device)
    heads = _split(query, attn.heads)
    checked = check_arguments(heads, key, value, image_keys, image_values, scales, vectors, None, softmax_scale)
    return replace(checked, rounds_scales=False)


def _split(projected: Tensor, heads: int) -> Tensor:
    """[B, N, H·D] to [B, H, N, D]."""
    return projected.view(projected.shape[0], -1, heads, projected.shape[-1] // heads).transpose(1, 2)


def keys_and_values(
    layer: Layer,
    attn: Attention,
    states: Tensor,
    use: Any,
    modules: tuple[nn.Module, nn.Module],
    guards: tuple[ModuleGuard, ModuleGuard] | None,
    runs_kernel: Callable[[Tensor], bool],
) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] each, of the text (`use` "text") or of an adapter's images, one or all: (adapter, image or None).

    modules: to_k and to_v; guards: theirs, None where nothing is kept.
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
        return _split(to_k(tokens()), attn.heads), _split(to_v(tokens()), attn.heads)

    if guards is None:
        return project()
    verified = tuple(guard.verified() for guard in guards)
    return get_or_compute(states, (layer, use, attn.heads), lambda: verified, project, layer.name)


def all_keys_and_values(
    layer: Layer, processor: Any, attn: Attention, text: Tensor, images: list[Tensor], counts: list[int | None]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of every branch, as `keys_and_values`: the text, then of each adapter all images at once, or one by one where counted."""
    guard = layer.guard(attn, processor)

    def runs_kernel(states: Tensor) -> bool:
        return False

    yield keys_and_values(layer, attn, text, "text", (attn.to_k, attn.to_v), guard.text, runs_kernel)
    for adapter, (state, count) in enumerate(zip(images, counts, strict=True)):
        modules = processor.to_k_ip[adapter], processor.to_v_ip[adapter]
        for i in (None,) if count is None else range(count):
            yield keys_and_values(layer, attn, state, (adapter, i), modules, guard.images[adapter], runs_kernel)


def _mask_vector(mask: Tensor, i: int, query: Tensor) -> Tensor:
    """[B or 1, M] for image i, in the dtype that stock rounds it to."""
    queries, dtype, device = query.shape[1], query.dtype, query.device
    return get_or_compute(
        mask, ("mask", i, queries, dtype, device), tuple, lambda: _resized(mask, i, queries).to(dtype=dtype, device=device)
    )


def _resized(mask: Tensor, image: int, queries: int) -> Tensor:
    """[B or 1, M]: one channel of the mask that stock multiplies with."""
    return IPAdapterMaskProcessor.downsample(mask[:, image], mask.shape[0], queries, 1)[..., 0].contiguous()  # type: ignore[no-any-return]


def _blank_vector(mask: Tensor, image: int, queries: int) -> Tensor:
    return mask.new_empty((mask.shape[0], queries))


# An op, since a mask of another aspect ratio than the picture makes diffusers warn, which no compiler traces.
_LIBRARY = torch.library.Library("ipa_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("mask_vector(Tensor mask, int image, int queries) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("mask_vector", _resized, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("ipa_kernels::mask_vector", _blank_vector, lib=_LIBRARY)
