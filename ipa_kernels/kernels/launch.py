"""Launch the kernel. What does not change from call to call is settled once, and nothing is validated: see `ops`."""

import math
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from .compiled import Compiled
from .dtypes import NAMES
from .forward import decoupled_attention_kernel
from .launch_table import LaunchConfig, options
from .specialization import INTERPRETED, Specialization, source, specialize


class Launch:
    """A launch with everything but the query settled.

    shape: [B, H, M, D] of the query; keys, values: [B or 1, H, N, D], text first; scales: [B or 1, n] float32, None without
    an image branch; masks: [B or 1, M] or None, one per image branch. All on one device, all but scales and masks of one
    dtype. It keeps what it was given: the memory that it points to stays where it is.

    vector, tensors and numbers are for the backward too: the elements in 16 bytes; keys, values, scales and masks as kernels
    read them; their strides, the sizes, and the factor of the scores.
    """

    def __init__(
        self,
        shape: torch.Size,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        scales: Tensor | None,
        masks: tuple[Tensor | None, ...],
        softmax_scale: float,
        tf32: bool,
        config: LaunchConfig,
    ) -> None:
        batch, heads, queries, head_dim = shape
        self.shape, self.dtype, self.device = shape, keys[0].dtype, keys[0].device
        lengths = tuple(key.shape[2] for key in keys)
        self.specialization = specialize(
            NAMES[self.dtype], head_dim, lengths, tuple(m if m is None else NAMES[m.dtype] for m in masks), tf32, config
        )
        self.vector = width = self.specialization.vector
        self._grid = (heads * triton.cdiv(queries, config.block_m), batch, 1)
        self._packed_shape = torch.Size((batch, queries, heads * head_dim))
        self._packed = (queries * heads * head_dim // width, head_dim // width, heads * head_dim // width)
        self._run: Any = None

        keys = tuple(readable(key, width) for key in keys)
        values = tuple(readable(value, width) for value in values)
        scales = readable_weights(scales)
        masks = tuple(readable_weights(mask) for mask in masks)
        self.tensors = (keys, values, scales, masks)
        self.numbers = (
            tuple(strides_of(key, batch, width) for key in keys),
            tuple(strides_of(value, batch, width) for value in values),
            row_stride_of(scales),
            tuple(row_stride_of(mask) for mask in masks),
            heads,
            queries,
            lengths,
            softmax_scale * math.log2(math.e),
        )
        self._addresses = tuple(map(_address, self.tensors))
        self._after = (*self.numbers, *self.specialization.constants.values())

    def __call__(self, query: Tensor) -> Tensor:
        """[B, H, M, D] to the same, stored [B, M, H, D]; on the device of the query, and its current stream."""
        _check_shape(query.shape, self.shape)
        batch, heads, queries, head_dim = self.shape
        out = torch.empty((batch, queries, heads, head_dim), dtype=self.dtype, device=self.device)
        query = readable(query, self.vector)
        self._launch(out, query, strides_of(query, batch, self.vector))
        return out.transpose(1, 2)

    def packed(self, query: Tensor) -> Tensor:
        """The same for [B, M, H·D]."""
        _check_shape(query.shape, self._packed_shape)
        if not query.is_contiguous() or query.data_ptr() % 16:
            batch, heads, queries, head_dim = self.shape
            out = self(query.view(batch, queries, heads, head_dim).transpose(1, 2))
            return out.transpose(1, 2).reshape(self._packed_shape)
        out = torch.empty_like(query)
        self._launch(out, query, self._packed)
        return out

    def _launch(self, out: Tensor, query: Tensor, strides: tuple[int, int, int]) -> None:
        if self.device.type == "cuda" and torch.cuda.current_device() != self.device.index:
            # Triton launches on the current device
            with torch.cuda.device(self.device):
                return self._launch(out, query, strides)
        if INTERPRETED:
            decoupled_attention_kernel[self._grid](out, query, *self.tensors, strides, *self._after)
            return
        if self._run is None:
            # what a grid makes of a compiled kernel is kept, and what stays is passed as addresses: Triton asks a driver for
            # the address of every tensor
            self._run = _compiled(self.specialization, self.device)[self._grid]
        self._run(out, query, *self._addresses, strides, *self._after, stream=current_stream(self.device))


@Compiled
def _compiled(specialization: Specialization, device: torch.device) -> Any:
    """Compiled for, and loaded on, the current device; from Triton's cache on disk where it has been compiled before."""
    return triton.compile(source(specialization), options=options(specialization.config))


def current_stream(device: torch.device) -> int:
    """The stream of a device that kernels are queued on now."""
    return driver.active.get_current_stream(device.index)  # type: ignore[no-any-return]


def _address(tensors: Any) -> Any:
    """That of a tensor, those of several; None stays None."""
    if isinstance(tensors, tuple):
        return tuple(map(_address, tensors))
    return None if tensors is None else tensors.data_ptr()


def _check_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    # the grid and the strides are those of the expected one: another would be read and written out of bounds
    if shape != expected:
        raise ValueError(f"query: expected the shape {list(expected)} that the launch was made for, got {list(shape)}")


def readable(tensor: Tensor, vector: int) -> Tensor:
    """The tensor, or a packed copy where its base or its strides are not multiples of 16 bytes or overflow 32 bits."""
    if tensor.data_ptr() % 16 == 0:
        batch, heads, rows, last = tensor.stride()
        aligned = not (batch % vector or heads % vector or rows % vector)
        if aligned and last == 1 and max(batch, heads) < 2**31 * vector and rows < 2**24:
            return tensor
    return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def readable_weights(weights: Tensor | None) -> Tensor | None:
    """Scales [B or 1, n] or a mask [B or 1, M], or a packed copy where a row has gaps or its stride overflows 32 bits."""
    if weights is None or (weights.stride(1) == 1 and weights.stride(0) < 2**31):
        return weights
    return weights.contiguous()


def row_stride_of(weights: Tensor | None) -> int:
    """That of a shared row is 0; the stride of a dimension of size 1 can be any number."""
    return 0 if weights is None or weights.shape[0] == 1 else weights.stride(0)


def strides_of(tensor: Tensor, batch: int, vector: int) -> tuple[int, int, int]:
    """Strides of batch, head and row in units of 16 bytes; that of a shared batch is 0."""
    strides = tensor.stride()
    return (strides[0] // vector if tensor.shape[0] == batch else 0, strides[1] // vector, strides[2] // vector)
