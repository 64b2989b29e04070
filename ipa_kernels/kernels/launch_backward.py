"""Launch the backward kernel, and sum what its programs computed. Nothing is validated: see `ops`.

Sums are taken by torch, in an order that the shapes settle: no atomics, the same bits every time.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .backward import decoupled_attention_backward_kernel
from .compiled import Compiled
from .launch import Launch, readable, strides_of
from .launch_table import LaunchConfig, options
from .specialization import INTERPRETED, Specialization
from .specialization_backward import Wanted, backward_source


@dataclass(frozen=True)
class Gradients:
    """query: [B, H, M, D], stored [B, M, H, D]. keys, values: [B or 1, H, N, D], as the tensor, stored [B, N, H, D]; text
    first. weights: [B, H, M] in float32, of scale times mask, one per image branch. None where not wanted.
    """

    query: Tensor
    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]
    weights: tuple[Tensor | None, ...]


def backward(
    gradient: Tensor,
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    scales: Tensor | None,
    masks: tuple[Tensor | None, ...],
    softmax_scale: float,
    tf32: bool,
    config: LaunchConfig,
    wanted: Wanted,
) -> Gradients:
    """From the gradient of the output [B, H, M, D], and the inputs of `Launch`."""
    forward = Launch(query.shape, keys, values, scales, masks, softmax_scale, tf32, config)
    (batch, heads, queries, head_dim), device, width = query.shape, query.device, forward.vector
    gradient, query = readable(gradient, width), readable(query, width)
    blocks = triton.cdiv(queries, config.block_m)
    out = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=device)

    def shares(asked: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        shapes = ((blocks, batch, key.shape[2], heads, head_dim) for key in keys)
        return tuple(_sums(shape, device) if yes else None for shape, yes in zip(shapes, asked, strict=True))

    key_shares, value_shares = shares(wanted.keys), shares(wanted.values)
    weights = tuple(_sums((batch, heads, queries), device) if yes else None for yes in wanted.weights)
    arguments = (
        out, key_shares, value_shares, weights, query, gradient, *forward.tensors,
        strides_of(query, batch, width), strides_of(gradient, batch, width), *forward.numbers, softmax_scale,
        *forward.specialization.constants.values(),
    )  # fmt: skip
    _launch(forward.specialization, wanted, device, (heads * blocks, batch, 1), arguments)
    return Gradients(
        out.transpose(1, 2),
        tuple(_total(share, key) for share, key in zip(key_shares, keys, strict=True)),
        tuple(_total(share, value) for share, value in zip(value_shares, values, strict=True)),
        weights,
    )


def _launch(
    specialization: Specialization, wanted: Wanted, device: torch.device, grid: tuple[int, ...], arguments: tuple[Any, ...]
) -> None:
    if device.type == "cuda" and torch.cuda.current_device() != device.index:
        # Triton launches on the current device
        with torch.cuda.device(device):
            return _launch(specialization, wanted, device, grid, arguments)
    kernel = decoupled_attention_backward_kernel if INTERPRETED else _compiled(specialization, wanted, device)
    kernel[grid](*arguments)


@Compiled
def _compiled(specialization: Specialization, wanted: Wanted, device: torch.device) -> Any:
    """Compiled for, and loaded on, the current device; from Triton's cache on disk where it has been compiled before."""
    return triton.compile(backward_source(specialization, wanted), options=options(specialization.config))


def _sums(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _total(shares: Tensor | None, tensor: Tensor) -> Tensor | None:
    """[blocks, B, N, H, D] to the shape and dtype of the tensor, rounded once; a shared batch gets the sum over all rows."""
    if shares is None:
        return None
    summed = shares.sum((0, 1)).unsqueeze(0) if tensor.shape[0] < shares.shape[1] else shares.sum(0)
    return summed.to(tensor.dtype).transpose(1, 2)
