"""The kernels under autograd: the forward keeps its inputs, the backward computes the rest anew.

What is kept is what the caller passed, where autograd's own hooks see it: checkpointing and offloading work, and an input
that is overwritten before the backward is an error.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .dispatch import UnsupportedError, allows_tf32, backward_config, transform_reasons
from .validation import Problem
from .weights import masks_for_kernel, scales_for_kernel

if TYPE_CHECKING:
    from ..kernels.launch import Launch
    from ..kernels.launch_backward import Gradients

T = TypeVar("T")


def attend(launch: "Launch", problem: Problem) -> Tensor:
    """What the launch returns that was made for the problem; differentiable once."""
    out: Tensor = _Attention.apply(launch, _form(problem), *problem.tensors())  # type: ignore[no-untyped-call]
    return out


def gradients(problem: Problem, needed: Sequence[bool], gradient: Tensor) -> tuple[Tensor | None, ...]:
    """A gradient, or None where it is not needed, for each of the problem's tensors."""
    return _gradients(_form(problem), problem.tensors(), tuple(needed), gradient)


def _form(problem: Problem) -> "_Form":
    scales = None if isinstance(problem.scales, Tensor) else problem.scales
    return _Form(len(problem.keys), scales, tuple(mask is not None for mask in problem.masks), problem.softmax_scale)


@dataclass(frozen=True)
class _Form:
    """A `Problem` without its tensors. scales: None where they are a tensor."""

    branches: int
    scales: tuple[float, ...] | None
    masked: tuple[bool, ...]
    softmax_scale: float

    def split(self, items: Sequence[T]) -> tuple[T, tuple[T, ...], tuple[T, ...], T | None, tuple[T | None, ...]]:
        """What belongs to query, keys, values, scales and masks, from one item for each of `Problem.tensors`."""
        rest = iter(items)
        query, keys, values = next(rest), tuple(islice(rest, self.branches)), tuple(islice(rest, self.branches))
        scales = next(rest) if self.scales is None else None
        return query, keys, values, scales, tuple(next(rest) if there else None for there in self.masked)

    def fill(self, tensors: Sequence[Tensor]) -> Problem:
        """The problem that these tensors are from."""
        query, keys, values, scales, masks = self.split(tensors)
        weights = self.scales if scales is None else scales
        assert weights is not None, "floats or a tensor"
        return Problem(query, keys, values, weights, masks, None, self.softmax_scale)


class _Attention(torch.autograd.Function):
    """Its inputs are the tensors of a problem, in the order of `Problem.tensors`."""

    @staticmethod
    def forward(ctx: Any, launch: "Launch", form: _Form, *tensors: Tensor) -> Tensor:
        """[B, H, M, D]."""
        ctx.form = form
        ctx.save_for_backward(*tensors)
        return launch(tensors[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """A gradient, or None, for each of the tensors."""
        tensors: tuple[Tensor, ...] = ctx.saved_tensors
        with torch.no_grad():
            found = _gradients(ctx.form, tensors, ctx.needs_input_grad[2:], gradient)
        if torch.is_grad_enabled():
            found = _Once.apply(len(found), *found, *tensors)  # type: ignore[no-untyped-call]
        return None, None, *found


class _Once(torch.autograd.Function):
    """Gradients that refuse to be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        """The first `count` of the tensors; the others are what those depend on."""
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Raises."""
        raise UnsupportedError('double backward: the kernel\'s gradients have no gradient of their own; use impl="eager"')


def _gradients(
    form: _Form, tensors: tuple[Tensor, ...], needed: tuple[bool, ...], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    reasons = transform_reasons()
    if reasons:
        raise UnsupportedError("; ".join(reasons))
    problem = form.fill(tensors)
    query, keys, values, scales, masks = form.split(needed)
    weights = scales_for_kernel(problem)
    # a view that negates lazily shares its memory with what it negates
    found = _launch(problem, gradient.resolve_neg(), weights, keys, values, tuple(bool(scales or mask) for mask in masks))
    gradients = [found.query if query else None, *found.keys, *found.values]
    if scales is not None:
        gradients.append(_scales(problem, found.weights) if scales else None)
    for i, mask in enumerate(problem.masks):
        if mask is not None:
            assert weights is not None, "there is an image branch"
            gradients.append(_mask(mask, weights[:, i, None], found.weights[i]) if masks[i] else None)
    return tuple(gradients)


def _launch(
    problem: Problem,
    gradient: Tensor,
    scales: Tensor | None,
    keys: tuple[bool, ...],
    values: tuple[bool, ...],
    weights: tuple[bool, ...],
) -> "Gradients":
    from ..kernels.launch_backward import Wanted, backward

    query = problem.query
    config = backward_config(problem)
    assert config is not None, "call_reasons was empty"
    return backward(
        gradient,
        query,
        problem.keys,
        problem.values,
        scales,
        masks_for_kernel(problem),
        problem.softmax_scale,
        allows_tf32(query.device),
        config,
        Wanted(keys, values, weights),
    )


def _scales(problem: Problem, weights: tuple[Tensor | None, ...]) -> Tensor:
    """[B or 1, n], from the gradients [B, H, M] of scale times mask."""
    scales = problem.scales
    assert isinstance(scales, Tensor), "a gradient is asked for"
    columns = []
    for weight, mask in zip(weights, problem.masks, strict=True):
        assert weight is not None, "it was asked for"
        by_query = weight.sum(1)
        columns.append((by_query if mask is None else by_query * mask.float()).sum(1))
    found = torch.stack(columns, 1) if columns else scales.new_zeros(problem.query.shape[0], 0)
    return _shared(found, scales)


def _mask(mask: Tensor, scale: Tensor, weight: Tensor | None) -> Tensor:
    """[B or 1, M], from the gradient [B, H, M] of scale times mask; scale [B or 1, 1]."""
    assert weight is not None, "it was asked for"
    # a scale of 0 takes the branch out, whatever it holds
    return _shared(torch.where(scale == 0, 0.0, weight.sum(1) * scale), mask)


def _shared(gradient: Tensor, tensor: Tensor) -> Tensor:
    """[B, ...] for the tensor, of which one row may serve the whole batch; rounded to its dtype, on its device."""
    summed = gradient.sum(0, keepdim=True) if tensor.shape[0] < gradient.shape[0] else gradient
    return summed.to(tensor.device, tensor.dtype)
