"""The forward kernel: out = softmax(Q·Kᵗ·scale)·V + Σᵢ wᵢ·softmax(Q·Kᵢᵗ·scale)·Vᵢ   (arXiv:2308.06721, section 3.2.2).

One program owns BLOCK_M queries of one head. It reads them once, walks through the branches, sums in registers and writes
once. The text has weight 1, image branch i the weight scale[b, i] · mask_i[b, m].
"""

import triton
import triton.language as tl

from .primitives import (
    add_scaled_rows,
    exp2_scaled,
    load_rows,
    of_head,
    scale_rows,
    scale_tiles,
    score_keys,
    store_rows,
    tile_begin,
    tile_count,
    tile_fill,
    tile_is_full,
    tile_width,
    weigh_values,
    zero_rows,
)


@triton.jit
def probabilities(
    q, k_base, k_stride, qk_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(weights, as a tuple of tiles [M, N], their sum [M]) of a short branch: all scores of a row live in registers at once."""
    s = ()
    for t in tl.static_range(tile_count(LENGTH)):
        k_tile = k_base + tile_begin(LENGTH, t) * k_stride.to(tl.int64)
        scores = score_keys(
            q, k_tile, k_stride, tile_fill(LENGTH, t), HEAD_DIM, tile_width(LENGTH, t), tile_is_full(LENGTH, t), PRECISION
        )
        s = s + (scores,)
    row_max = tl.max(s[0], 1)
    for t in tl.static_range(1, tile_count(LENGTH)):
        row_max = tl.maximum(row_max, tl.max(s[t], 1))
    shift = row_max * qk_scale
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    p = ()
    for t in tl.static_range(tile_count(LENGTH)):
        weights = exp2_scaled(s[t], qk_scale, shift)
        row_sum += tl.sum(weights, 1)
        p = p + (weights,)
    return p, row_sum


@triton.jit
def _weigh(acc, p, v_base, v_stride, HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p·V of a short branch."""
    for t in tl.static_range(tile_count(LENGTH)):
        v_tile = v_base + tile_begin(LENGTH, t) * v_stride.to(tl.int64)
        acc = weigh_values(
            acc, p[t], v_tile, v_stride, tile_fill(LENGTH, t),
            HEAD_DIM, tile_width(LENGTH, t), tile_is_full(LENGTH, t), PRECISION,
        )  # fmt: skip
    return acc


@triton.jit
def _online_step(
    acc, row_sum, shift, q, k_base, v_base, k_stride, v_stride, remaining, qk_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of the online softmax."""
    s = score_keys(q, k_base, k_stride, remaining, HEAD_DIM, WIDTH, FULL, PRECISION)
    # the shift is carried as it was rounded, so that what is summed already and what is added have the same one
    new_shift = tl.maximum(shift, tl.max(s, 1) * qk_scale)
    # while all scores are -inf there is nothing to shift by, and -inf - -inf would be NaN
    finite_shift = tl.where(new_shift == float("-inf"), 0.0, new_shift)
    alpha = tl.exp2(shift - finite_shift)
    p = exp2_scaled(s, qk_scale, finite_shift)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    acc = weigh_values(scale_rows(acc, alpha), p, v_base, v_stride, remaining, HEAD_DIM, WIDTH, FULL, PRECISION)
    return acc, row_sum, new_shift


@triton.jit
def _attend_looped(
    q, k_base, v_base, k_stride, v_stride, length, qk_scale,
    HEAD_DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(unnormalised output, sum of weights) of a branch of any length: whole blocks of BLOCK_N keys, then up to REST more."""
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = zero_rows(HEAD_DIM, BLOCK_M)
    blocks = length // BLOCK_N * BLOCK_N
    for begin in tl.range(0, blocks, BLOCK_N):
        acc, row_sum, shift = _online_step(
            acc, row_sum, shift, q, k_base + begin * k_stride.to(tl.int64), v_base + begin * v_stride.to(tl.int64),
            k_stride, v_stride, BLOCK_N, qk_scale, HEAD_DIM, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    for t in tl.static_range(tile_count(REST)):
        begin = blocks + tile_begin(REST, t)
        acc, row_sum, shift = _online_step(
            acc, row_sum, shift, q, k_base + begin * k_stride.to(tl.int64), v_base + begin * v_stride.to(tl.int64),
            k_stride, v_stride, length - begin, qk_scale, HEAD_DIM, tile_width(REST, t), False, PRECISION,
        )  # fmt: skip
    return acc, row_sum


@triton.jit
def _text(
    q, k_base, v_base, k_stride, v_stride, length, qk_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """softmax(...)·V of the text; LENGTH is its number of keys where it is held whole, 0 where it is looped over."""
    if LENGTH > 0:
        p, row_sum = probabilities(q, k_base, k_stride, qk_scale, HEAD_DIM, LENGTH, BLOCK_M, PRECISION)
        acc = _weigh(zero_rows(HEAD_DIM, BLOCK_M), p, v_base, v_stride, HEAD_DIM, LENGTH, PRECISION)
    else:
        acc, row_sum = _attend_looped(
            q, k_base, v_base, k_stride, v_stride, length, qk_scale, HEAD_DIM, REST, BLOCK_M, BLOCK_N, PRECISION
        )
    return scale_rows(acc, 1.0 / row_sum)


@triton.jit
def _add_image(
    acc, q, k_base, v_base, k_stride, v_stride, length, qk_scale, weight, mask,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + weight · mask · softmax(...)·V of one image branch; mask [M] or None."""
    if LENGTH == 0:
        image, row_sum = _attend_looped(
            q, k_base, v_base, k_stride, v_stride, length, qk_scale, HEAD_DIM, REST, BLOCK_M, BLOCK_N, PRECISION
        )
        return add_scaled_rows(acc, image, _factor(weight, mask, row_sum))
    else:
        # the factor is folded into p, so that one accumulator holds the sum of all branches
        p, row_sum = probabilities(q, k_base, k_stride, qk_scale, HEAD_DIM, LENGTH, BLOCK_M, PRECISION)
        if v_base.dtype.element_ty != tl.float16:
            p = scale_rows(p, _factor(weight, mask, row_sum))
            return _weigh(acc, p, v_base, v_stride, HEAD_DIM, LENGTH, PRECISION)
        else:
            # p is rounded to float16: a weight that would overflow there, or end in the subnormals, stays outside
            unit = _unfolded_weight(weight, mask)
            factor = _factor(weight, mask, row_sum) / unit
            if mask is not None:
                acc = scale_rows(acc, 1.0 / unit)
                acc = _weigh(acc, scale_rows(p, factor), v_base, v_stride, HEAD_DIM, LENGTH, PRECISION)
                return scale_rows(acc, unit)
            else:
                if unit != 1.0:
                    acc = scale_tiles(acc, 1.0 / unit)
                acc = _weigh(acc, scale_rows(p, factor), v_base, v_stride, HEAD_DIM, LENGTH, PRECISION)
                if unit != 1.0:
                    acc = scale_tiles(acc, unit)
                return acc


@triton.jit
def _unfolded_weight(weight, mask):
    """What of |weight · mask| is not folded into p: a number, with a mask one per row; 1 from 1/64 to 1, and for 0."""
    if mask is None:
        size = tl.abs(weight)
    else:
        size = tl.abs(weight * mask)
    # not below 2**-100: the accumulator is divided by it
    return tl.where(((size >= 0.015625) & (size <= 1.0)) | (size == 0.0), 1.0, tl.maximum(size, 7.888609e-31))


@triton.jit
def _factor(weight, mask, row_sum):
    """weight · mask / row_sum, [M]; a mask of None is 1."""
    factor = weight / row_sum
    if mask is not None:
        factor = factor * mask
    return factor


@triton.jit
def decoupled_attention_kernel(
    out_ptr, q_ptr, k_ptrs, v_ptrs, scale_ptr, mask_ptrs,
    q_strides, k_strides, v_strides, scale_stride, mask_strides,
    heads, q_len, lengths, qk_scale,
    HEAD_DIM: tl.constexpr, LENGTHS: tl.constexpr, RESTS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # heads fastest: neighbouring programs share the cache lines of a [B, M, H·D] row.
    # int64 before the first multiply: an offset may pass 2**31.
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) // heads).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    in_range = rows < q_len - first

    q_base = of_head(q_ptr, q_strides, batch, head, VECTOR) + first * q_strides[2] * VECTOR
    q = load_rows(q_base, q_strides[2] * VECTOR, in_range, HEAD_DIM, BLOCK_M, False)

    acc = _text(
        q, of_head(k_ptrs[0], k_strides[0], batch, head, VECTOR), of_head(v_ptrs[0], v_strides[0], batch, head, VECTOR),
        k_strides[0][2] * VECTOR, v_strides[0][2] * VECTOR, lengths[0], qk_scale,
        HEAD_DIM, LENGTHS[0], RESTS[0], BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    for i in tl.static_range(1, len(k_ptrs)):
        weight = tl.load(scale_ptr + batch * scale_stride + (i - 1))
        # a branch of scale 0 is not read at all: it may hold anything, NaN included
        if weight != 0.0:
            if mask_ptrs[i - 1] is None:
                mask = None
            else:
                mask_base = mask_ptrs[i - 1] + batch * mask_strides[i - 1] + first
                mask = tl.load(mask_base + rows, mask=in_range, other=0.0).to(tl.float32)
            acc = _add_image(
                acc, q,
                of_head(k_ptrs[i], k_strides[i], batch, head, VECTOR), of_head(v_ptrs[i], v_strides[i], batch, head, VECTOR),
                k_strides[i][2] * VECTOR, v_strides[i][2] * VECTOR, lengths[i], qk_scale, weight, mask,
                HEAD_DIM, LENGTHS[i], RESTS[i], BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip

    # the output is packed [B, M, H, D]
    row_stride = heads * HEAD_DIM
    out_base = out_ptr + (batch * q_len + first) * row_stride + head * HEAD_DIM
    store_rows(out_base, row_stride, in_range, acc, HEAD_DIM, BLOCK_M)
