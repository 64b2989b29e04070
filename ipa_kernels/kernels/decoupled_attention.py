"""The forward kernel: out = softmax(Q·Kᵗ·scale)·V + Σᵢ wᵢ·softmax(Q·Kᵢᵗ·scale)·Vᵢ   (arXiv:2308.06721, section 3.2.2).

One program owns BLOCK_M queries of one head. It reads them once, walks through the branches, sums in registers and writes
once. Branch 0 is the text; it has weight 1. Branch i has the weight scale[b, i] · mask_i[b, m].
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch_table import LaunchConfig
from .tiles import (
    add_scaled_rows,
    exp2_scaled,
    load_rows,
    multiple,
    scale_rows,
    score_keys,
    store_rows,
    tile_begin,
    tile_count,
    tile_width,
    weigh_values,
    zero_rows,
)


@triton.jit
def _attend_whole(
    q, k_base, v_base, k_stride, v_stride, qk_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(unnormalised output, sum of weights) of a short branch: all scores of a row live in registers at once."""
    s = ()
    for t in tl.static_range(tile_count(LENGTH)):
        s = s + (score_keys(q, k_base, k_stride, tile_begin(LENGTH, t), LENGTH, HEAD_DIM, tile_width(LENGTH, t), PRECISION),)
    row_max = tl.max(s[0], 1)
    for t in tl.static_range(1, tile_count(LENGTH)):
        row_max = tl.maximum(row_max, tl.max(s[t], 1))
    shift = row_max * qk_scale
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = zero_rows(HEAD_DIM, BLOCK_M)
    for t in tl.static_range(tile_count(LENGTH)):
        p = exp2_scaled(s[t], qk_scale, shift)
        row_sum += tl.sum(p, 1)
        acc = weigh_values(acc, p, v_base, v_stride, tile_begin(LENGTH, t), LENGTH, HEAD_DIM, tile_width(LENGTH, t), PRECISION)
    return acc, row_sum


@triton.jit
def _attend_looped(
    q, k_base, v_base, k_stride, v_stride, length, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for a branch of any length: the online softmax, BLOCK_N keys at a time."""
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = zero_rows(HEAD_DIM, BLOCK_M)
    for begin in tl.range(0, length, BLOCK_N):
        s = score_keys(q, k_base, k_stride, begin, length, HEAD_DIM, BLOCK_N, PRECISION)
        # the shift is carried as it was rounded, so that what is summed already and what is added have the same one
        new_shift = tl.maximum(shift, tl.max(s, 1) * qk_scale)
        # while all scores are -inf there is nothing to shift by, and -inf - -inf would be NaN
        finite_shift = tl.where(new_shift == float("-inf"), 0.0, new_shift)
        alpha = tl.exp2(shift - finite_shift)
        p = exp2_scaled(s, qk_scale, finite_shift)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        acc = weigh_values(scale_rows(acc, alpha, HEAD_DIM), p, v_base, v_stride, begin, length, HEAD_DIM, BLOCK_N, PRECISION)
        shift = new_shift
    return acc, row_sum


@triton.jit
def _attend(
    q, k_ptr, v_ptr, k_strides, v_strides, batch, head, length, qk_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One branch; LENGTH is its number of keys where it is held whole, 0 where it is looped over."""
    k_base = k_ptr + batch * multiple(k_strides[0], ALIGN) + head * multiple(k_strides[1], ALIGN)
    v_base = v_ptr + batch * multiple(v_strides[0], ALIGN) + head * multiple(v_strides[1], ALIGN)
    k_stride = multiple(k_strides[2], ALIGN)
    v_stride = multiple(v_strides[2], ALIGN)
    if LENGTH > 0:
        return _attend_whole(q, k_base, v_base, k_stride, v_stride, qk_scale, HEAD_DIM, LENGTH, BLOCK_M, PRECISION)
    else:
        return _attend_looped(q, k_base, v_base, k_stride, v_stride, length, qk_scale, HEAD_DIM, BLOCK_M, BLOCK_N, PRECISION)


@triton.jit
def decoupled_attention_kernel(
    out_ptr, q_ptr, k_ptrs, v_ptrs, scale_ptr, mask_ptrs,
    out_strides, q_strides, k_strides, v_strides, scale_strides, mask_strides,
    heads, q_len, lengths, qk_scale,
    HEAD_DIM: tl.constexpr, LENGTHS: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # heads fastest: neighbouring programs share the cache lines of a [B, M, H·D] row.
    # int64 before the first multiply: an offset may pass 2**31.
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < q_len

    q_base = q_ptr + batch * multiple(q_strides[0], ALIGN) + head * multiple(q_strides[1], ALIGN)
    q = load_rows(q_base, multiple(q_strides[2], ALIGN), rows, in_range, HEAD_DIM)

    acc, row_sum = _attend(
        q, k_ptrs[0], v_ptrs[0], k_strides[0], v_strides[0], batch, head, lengths[0], qk_scale,
        HEAD_DIM, LENGTHS[0], ALIGN, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc = scale_rows(acc, 1.0 / row_sum, HEAD_DIM)

    for i in tl.static_range(1, len(k_ptrs)):
        weight = tl.load(scale_ptr + batch * scale_strides[0] + (i - 1) * scale_strides[1])
        # a branch of scale 0 is not read at all: it may hold anything, NaN included
        if weight != 0.0:
            image, row_sum = _attend(
                q, k_ptrs[i], v_ptrs[i], k_strides[i], v_strides[i], batch, head, lengths[i], qk_scale,
                HEAD_DIM, LENGTHS[i], ALIGN, BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
            factor = weight / row_sum
            if mask_ptrs[i - 1] is not None:
                mask = tl.load(mask_ptrs[i - 1] + batch * mask_strides[i - 1] + rows, mask=in_range, other=0.0)
                factor = factor * mask.to(tl.float32)
            # weighted after the dot, in float32: a weight folded into p would overflow float16 from 65504 on
            acc = add_scaled_rows(acc, image, factor, HEAD_DIM)

    out_base = out_ptr + batch * multiple(out_strides[0], ALIGN) + head * multiple(out_strides[1], ALIGN)
    store_rows(out_base, multiple(out_strides[2], ALIGN), rows, in_range, acc, HEAD_DIM)


INTERPRETED = not isinstance(decoupled_attention_kernel, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET=1 was set when this module was imported: kernels then run on the CPU, in numpy."""


def launch(
    out: Tensor,
    query: Tensor,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    scales: Tensor | None,
    masks: tuple[Tensor | None, ...],
    softmax_scale: float,
    tf32: bool,
    config: LaunchConfig,
) -> None:
    """Launch once, on the current device and stream. Nothing is validated here: see `ops`.

    out, query: [B, H, M, D]; keys, values: [B, H, N, D], text first, batch-expanded where shared; scales: [B, n] float32,
    None without an image branch; masks: [B, M] with unit last stride or None, one per image branch. All on one device, all
    but scales and masks of one dtype, with unit last stride.
    """
    batch, heads, queries, head_dim = query.shape
    lengths = tuple(key.shape[2] for key in keys)
    strides = [tensor.stride()[:3] for tensor in (out, query, *keys, *values)]
    n = len(keys)
    decoupled_attention_kernel[(heads * triton.cdiv(queries, config.block_m), batch)](
        out, query, keys, values, scales, masks,
        strides[0], strides[1], tuple(strides[2 : 2 + n]), tuple(strides[2 + n :]),
        scales.stride() if scales is not None else (0, 0),
        tuple(0 if mask is None else mask.stride(0) for mask in masks),
        heads, queries, lengths, softmax_scale * math.log2(math.e),
        HEAD_DIM=head_dim,
        LENGTHS=whole_lengths(lengths, config),
        ALIGN=_alignment(strides, 16 // query.element_size()),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def whole_lengths(lengths: tuple[int, ...], config: LaunchConfig) -> tuple[int, ...]:
    """Per branch, its length where it is held whole (a compiled constant), 0 where it is looped over (runtime data).

    One image branch that must be looped over takes the others with it: a mixture needs the registers of both.
    """
    text, *images = lengths
    whole_images = max(images, default=0) <= config.whole_image_keys
    return (text if text <= config.whole_keys else 0, *(image if whole_images else 0 for image in images))


def _alignment(strides: list[tuple[int, ...]], vector: int) -> int:
    """`vector`, the elements in 16 bytes, where it divides every stride and the compiler would not see it by itself; else 1."""
    flat = [stride for triple in strides for stride in triple]
    seen_by_triton = all(stride % 16 == 0 for stride in flat)
    return vector if not seen_by_triton and all(stride % vector == 0 for stride in flat) else 1
