"""`torch.ops.ipa_kernels.decoupled_attention`: the kernel as one opaque op, for compilers, exporters and fake tensors.

In eager mode nobody comes through here: see docs/decisions/0013-compiled.md for what the boundary costs.
"""

from typing import Any

import torch
from torch import Tensor

from .api import choose, run
from .autograd import gradients
from .validation import Problem

_ARGUMENTS = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor? scales, Tensor[] masks, bool[] masked, float softmax_scale, "
    "bool rounds_scales, str impl"
)

_LIBRARY = torch.library.Library("ipa_kernels", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define(f"decoupled_attention({_ARGUMENTS}) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    f"decoupled_attention_backward(Tensor gradient, {_ARGUMENTS}, bool[] needed) -> Tensor[]"
)


def _problem(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    scales: Tensor | None,
    masks: list[Tensor],
    masked: list[bool],
    softmax_scale: float,
    rounds_scales: bool,
) -> Problem:
    """Arguments as in `Problem`, text first; they were validated when they were traced.

    masked: which image branches have a mask. (Autograd takes no list with gaps.)
    """
    given = iter(masks)
    places = tuple(next(given) if there else None for there in masked)
    weights = () if scales is None else scales
    return Problem(query, tuple(keys), tuple(values), weights, places, None, softmax_scale, rounds_scales)


@torch.no_grad()
def _attend(*arguments: Any) -> Tensor:
    """[B, H, M, D], stored [B, M, H, D].

    impl, the last argument: "triton", or "auto" where sizes that eager is faster for may still come.
    """
    *parts, impl = arguments
    problem = _problem(*parts)
    chosen, _ = choose(problem, impl)
    return run(problem, chosen)


def _gradients(gradient: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of those of `Problem.tensors` that are needed, in their order."""
    *parts, impl, needed = arguments
    problem = _problem(*parts)
    tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(problem.tensors(), needed, strict=True)]
    problem = problem.with_tensors(tensors)
    with torch.enable_grad():
        chosen, _ = choose(problem, impl)
        if chosen != "triton":
            out = run(problem, chosen)
            found = torch.autograd.grad(out, [tensor for tensor in tensors if tensor.requires_grad], gradient)
            return [_packed(tensor) for tensor in found]
    with torch.no_grad():
        return [_packed(tensor) for tensor in gradients(problem, needed, gradient) if tensor is not None]


def _packed(tensor: Tensor) -> Tensor:
    """As a compiler was told that it is stored: [B, H, N, D] as [B, N, H, D], anything else as it is."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2) if tensor.ndim == 4 else tensor.contiguous()


def _blank(tensor: Tensor) -> Tensor:
    """`_packed`, of the same shape, for a compiler to look at."""
    if tensor.ndim != 4:
        return tensor.new_empty(tensor.shape)
    batch, heads, rows, head_dim = tensor.shape
    return tensor.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


def _shape(query: Tensor, *arguments: object) -> Tensor:
    return _blank(query)


def _shapes(gradient: Tensor, *arguments: Any) -> list[Tensor]:
    *parts, _, needed = arguments
    return [_blank(tensor) for tensor, need in zip(_problem(*parts).tensors(), needed, strict=True) if need]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, keys, values, scales, masks, *ctx.rest = inputs
    ctx.branches, ctx.has_scales = len(keys), scales is not None
    ctx.save_for_backward(query, *keys, *values, *([] if scales is None else [scales]), *masks)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """A gradient, or None, for each argument; lists for the lists."""
    saved, n = list(ctx.saved_tensors), ctx.branches
    query, keys, values, rest = saved[0], saved[1 : n + 1], saved[n + 1 : 2 * n + 1], saved[2 * n + 1 :]
    scales, masks = (rest[0], rest[1:]) if ctx.has_scales else (None, rest)
    lists = [[query], keys, values, [] if scales is None else [scales], masks]
    needed = [_each(need, tensors) for need, tensors in zip(ctx.needs_input_grad, lists, strict=False)]
    flat = [need for needs in needed for need in needs]
    backward = torch.ops.ipa_kernels.decoupled_attention_backward
    found = iter(backward(gradient, query, keys, values, scales, masks, *ctx.rest, flat))
    of_query, of_keys, of_values, of_scales, of_masks = ([next(found) if need else None for need in needs] for needs in needed)
    return of_query[0], of_keys, of_values, of_scales[0] if of_scales else None, of_masks, *(None for _ in ctx.rest)


def _each(needs: Any, tensors: list[Any]) -> list[bool]:
    """One answer for each tensor of a list: autograd gives one for all of them, or a list."""
    return list(needs) if isinstance(needs, list | tuple) else [bool(needs)] * len(tensors)


for _name, _run, _fake in (
    ("decoupled_attention", _attend, _shape),
    ("decoupled_attention_backward", _gradients, _shapes),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"ipa_kernels::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("ipa_kernels::decoupled_attention", _backward, setup_context=_save, lib=_LIBRARY)
