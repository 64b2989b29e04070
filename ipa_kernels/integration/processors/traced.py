"""A call that a compiler traces or a CUDA graph captures, to be run again with other data."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ...ops import UnsupportedError
from ...ops.api import run, traced_op
from ...ops.dispatch import choose
from ...ops.validation import Problem, check_arguments
from ..replaced import replaced_reasons
from ..state import Layer
from .branches import cannot, mask_reasons, merge, of_adapters, problem_of, resized, softmax_scale, split, stock_reasons


def traced_call(
    kind: Any,
    layer: Layer,
    processor: Any,
    attn: Attention,
    hidden_states: Tensor,
    states: Any,
    attention_mask: Any,
    masks: Any,
) -> Tensor | None:
    """A call in a graph, which runs later and with other data; None where that is for the replaced class.

    No value of a scale is looked at: it would be compiled in. Nothing is counted: this runs once, when the graph is traced.
    """
    impl = layer.context.impl
    # where the hook before the step is in the graph too, a scale is what it is for this code: compiled in
    is_data = layer.context.is_stepping and layer.table.is_data
    scales = [None] * layer.table.tensor.shape[0] if is_data else processor.scale
    reasons = replaced_reasons(kind.replaces, attn, masks is not None)
    reasons += mask_reasons(kind, masks)
    reasons += stock_reasons(processor, attn, hidden_states, states, attention_mask, masks, scales)
    chosen = "stock"
    if not reasons:
        query = attn.to_q(hidden_states)
        inputs = *states, masks
        scale = softmax_scale(kind, attn)
        try:
            if is_data:
                problem = graph_problem(layer, processor, attn, query, inputs, scale)
            else:
                problem = problem_of(layer, processor, attn, query, inputs, scale, lambda states: False)
            chosen, reasons = choose(problem, impl)
        except UnsupportedError:
            raise
        except (TypeError, ValueError):
            # what they say is no constant, which a graph's reason must be
            reasons = ["unusual input: a step that is not compiled names it"]
    if chosen == "eager" and not kind.eager_is_exact:
        chosen = "stock"
    if chosen == "stock" and impl == "triton":
        raise UnsupportedError(cannot(layer, attn, hidden_states, reasons))
    layer.impl, layer.reason = chosen, "; ".join(reasons)
    if chosen == "stock":
        return None
    return merge(run(problem, chosen) if chosen == "eager" else traced_op(problem, impl))


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
            keys = [split(key, attn.heads) for key in static.keys]
            values = [split(value, attn.heads) for value in static.values]
            return _checked(query, attn, keys, values, scales, vectors, softmax_scale)
    if not torch.compiler.is_compiling() and any(mask is not None for mask in masks):
        raise UnsupportedError(
            f"ip_adapter_masks: none were prepared for {query.shape[1]} queries, and a graph reads no others"
        )
    branches = list(projections(processor, attn, text, images, counts))
    keys = [split(to_k(tokens), attn.heads) for tokens, to_k, _ in branches]
    values = [split(to_v(tokens), attn.heads) for tokens, _, to_v in branches]
    return _checked(
        query, attn, keys, values, scales, mask_vectors(masks, query.shape[1], query.dtype, query.device), softmax_scale
    )


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
    heads = split(query, attn.heads)
    checked = check_arguments(heads, key, value, image_keys, image_values, scales, vectors, None, softmax_scale)
    return replace(checked, rounds_scales=False)


def _blank_vector(mask: Tensor, image: int, queries: int) -> Tensor:
    return mask.new_empty((mask.shape[0], queries))


# An op, since a mask of another aspect ratio than the picture makes diffusers warn, which no compiler traces.
_LIBRARY = torch.library.Library("ipa_kernels", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("mask_vector(Tensor mask, int image, int queries) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("mask_vector", resized, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("ipa_kernels::mask_vector", _blank_vector, lib=_LIBRARY)
