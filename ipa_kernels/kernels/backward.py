"""The backward kernel: the gradients of decoupled attention, from its inputs and G, the gradient of its output.

For each branch, with P = softmax(Q·Kᵗ·scale) and the weight w of a query (1 for the text, scale[b, i] · mask_i[b, m] for an
image):

    R = G·Vᵗ    δ = Σₙ P·R    S = w·P·(R - δ)        dQ += S·K·scale    dK = Sᵗ·Q·scale    dV = (w·P)ᵗ·G    dw = δ

One program owns BLOCK_M queries of one head, as in the forward, and computes the softmax anew: nothing but the inputs needs to
be kept. dQ is summed over the branches in registers. dK and dV are sums over queries; a program stores its partial sums. δ
is written where it is asked for; whoever launches sums it to the gradients of scales and masks.
"""

import triton
import triton.language as tl

from .forward import probabilities
from .gradient_tiles import grad_tile, store_zeros
from .primitives import (
    exp2_scaled,
    load_rows,
    multiply_rows,
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
    zero_rows,
)


@triton.jit
def _probs(
    q, g, k_base, v_base, k_stride, v_stride, qk_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(P, R, as tuples of tiles [M, N], δ [M]) of a short branch: all of a row lives in registers at once."""
    p, row_sum = probabilities(q, k_base, k_stride, qk_scale, HEAD_DIM, LENGTH, BLOCK_M, PRECISION)
    p = scale_rows(p, 1.0 / row_sum)
    delta = tl.full([BLOCK_M], 0.0, tl.float32)
    r = ()
    for t in tl.static_range(tile_count(LENGTH)):
        v_tile = v_base + tile_begin(LENGTH, t) * v_stride.to(tl.int64)
        products = multiply_rows(
            g, v_tile, v_stride, tile_fill(LENGTH, t), HEAD_DIM, tile_width(LENGTH, t), tile_is_full(LENGTH, t), PRECISION
        )
        delta += tl.sum(p[t] * products, 1)
        r = r + (products,)
    return p, r, delta


@triton.jit
def _softmax_stats_tile(
    shift, row_sum, delta, q, g, k_base, v_base, k_stride, v_stride, remaining, qk_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of the online softmax; δ is not yet divided by the sum."""
    s = score_keys(q, k_base, k_stride, remaining, HEAD_DIM, WIDTH, FULL, PRECISION)
    new_shift = tl.maximum(shift, tl.max(s, 1) * qk_scale)
    # while all scores are -inf there is nothing to shift by, and -inf - -inf would be NaN
    finite_shift = tl.where(new_shift == float("-inf"), 0.0, new_shift)
    alpha = tl.exp2(shift - finite_shift)
    p = exp2_scaled(s, qk_scale, finite_shift)
    r = multiply_rows(g, v_base, v_stride, remaining, HEAD_DIM, WIDTH, FULL, PRECISION)
    return new_shift, row_sum * alpha + tl.sum(p, 1), delta * alpha + tl.sum(p * r, 1)


@triton.jit
def _softmax_stats(
    q, g, k_base, v_base, k_stride, v_stride, length, qk_scale,
    HEAD_DIM: tl.constexpr, REST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(shift, sum of weights, δ), [M] each, of a branch of any length: what a second walk over its keys needs to know."""
    shift = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    delta = tl.full([BLOCK_M], 0.0, tl.float32)
    blocks = length // BLOCK_N * BLOCK_N
    for begin in tl.range(0, blocks, BLOCK_N):
        shift, row_sum, delta = _softmax_stats_tile(
            shift, row_sum, delta, q, g, k_base + begin * k_stride.to(tl.int64), v_base + begin * v_stride.to(tl.int64),
            k_stride, v_stride, BLOCK_N, qk_scale, HEAD_DIM, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    for t in tl.static_range(tile_count(REST)):
        begin = blocks + tile_begin(REST, t)
        shift, row_sum, delta = _softmax_stats_tile(
            shift, row_sum, delta, q, g, k_base + begin * k_stride.to(tl.int64), v_base + begin * v_stride.to(tl.int64),
            k_stride, v_stride, length - begin, qk_scale, HEAD_DIM, tile_width(REST, t), False, PRECISION,
        )  # fmt: skip
    return shift, row_sum, delta / row_sum


@triton.jit
def _grad_whole(
    dq, p, r, delta, weight, q, g, k_base, dk_base, dv_base, k_stride, partial_stride, softmax_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`grad_tile` over a short branch."""
    for t in tl.static_range(tile_count(LENGTH)):
        dq = grad_tile(
            dq, p[t], r[t], delta, weight, q, g, k_base, dk_base, dv_base, k_stride, partial_stride,
            tile_begin(LENGTH, t), tile_fill(LENGTH, t), softmax_scale,
            HEAD_DIM, tile_width(LENGTH, t), tile_is_full(LENGTH, t), PRECISION,
        )  # fmt: skip
    return dq


@triton.jit
def _grad_recomputed(
    dq, shift, inverse, delta, weight, q, g, k_base, v_base, dk_base, dv_base, k_stride, v_stride, partial_stride,
    begin, remaining, qk_scale, softmax_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`grad_tile` of a tile whose P and R are computed again; inverse: of the sum of weights."""
    s = score_keys(q, k_base + begin * k_stride.to(tl.int64), k_stride, remaining, HEAD_DIM, WIDTH, FULL, PRECISION)
    p = exp2_scaled(s, qk_scale, shift) * inverse[:, None]
    r = multiply_rows(g, v_base + begin * v_stride.to(tl.int64), v_stride, remaining, HEAD_DIM, WIDTH, FULL, PRECISION)
    return grad_tile(
        dq, p, r, delta, weight, q, g, k_base, dk_base, dv_base, k_stride, partial_stride, begin, remaining, softmax_scale,
        HEAD_DIM, WIDTH, FULL, PRECISION,
    )  # fmt: skip


@triton.jit
def _grad_looped(
    dq, shift, row_sum, delta, weight, q, g, k_base, v_base, dk_base, dv_base, k_stride, v_stride, partial_stride,
    length, qk_scale, softmax_scale,
    HEAD_DIM: tl.constexpr, REST: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`grad_tile` over a branch of any length, in the steps of `_softmax_stats`."""
    inverse = 1.0 / row_sum
    blocks = length // BLOCK_N * BLOCK_N
    for begin in tl.range(0, blocks, BLOCK_N):
        dq = _grad_recomputed(
            dq, shift, inverse, delta, weight, q, g, k_base, v_base, dk_base, dv_base, k_stride, v_stride, partial_stride,
            begin, BLOCK_N, qk_scale, softmax_scale, HEAD_DIM, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    for t in tl.static_range(tile_count(REST)):
        begin = blocks + tile_begin(REST, t)
        dq = _grad_recomputed(
            dq, shift, inverse, delta, weight, q, g, k_base, v_base, dk_base, dv_base, k_stride, v_stride, partial_stride,
            begin, length - begin, qk_scale, softmax_scale, HEAD_DIM, tile_width(REST, t), False, PRECISION,
        )  # fmt: skip
    return dq


@triton.jit
def _text(
    q, g, k_base, v_base, dk_base, dv_base, k_stride, v_stride, partial_stride, length, qk_scale, softmax_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ/scale of the text; LENGTH is its number of keys where it is held whole, 0 where it is looped over."""
    dq = zero_rows(HEAD_DIM, BLOCK_M)
    if LENGTH > 0:
        p, r, delta = _probs(q, g, k_base, v_base, k_stride, v_stride, qk_scale, HEAD_DIM, LENGTH, BLOCK_M, PRECISION)
        return _grad_whole(
            dq, p, r, delta, None, q, g, k_base, dk_base, dv_base, k_stride, partial_stride, softmax_scale,
            HEAD_DIM, LENGTH, PRECISION,
        )  # fmt: skip
    else:
        shift, row_sum, delta = _softmax_stats(
            q, g, k_base, v_base, k_stride, v_stride, length, qk_scale, HEAD_DIM, REST, BLOCK_M, BLOCK_N, PRECISION
        )
        return _grad_looped(
            dq, shift, row_sum, delta, None, q, g, k_base, v_base, dk_base, dv_base, k_stride, v_stride, partial_stride,
            length, qk_scale, softmax_scale, HEAD_DIM, REST, BLOCK_N, PRECISION,
        )  # fmt: skip


@triton.jit
def _add_image(
    dq, q, g, k_base, v_base, dk_base, dv_base, delta_base, k_stride, v_stride, partial_stride, length, scale, mask, in_range,
    qk_scale, softmax_scale,
    HEAD_DIM: tl.constexpr, LENGTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ/scale + that of one image branch, whose δ is stored where it is asked for; mask [M] or None."""
    weight = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if mask is not None:
        weight = weight * mask
    if LENGTH > 0:
        p, r, delta = _probs(q, g, k_base, v_base, k_stride, v_stride, qk_scale, HEAD_DIM, LENGTH, BLOCK_M, PRECISION)
        # a branch of scale 0 was read for the sake of δ: what it holds may not reach dQ, not even times 0
        if scale != 0.0:
            dq = _grad_whole(
                dq, p, r, delta, weight, q, g, k_base, dk_base, dv_base, k_stride, partial_stride, softmax_scale,
                HEAD_DIM, LENGTH, PRECISION,
            )  # fmt: skip
    else:
        shift, row_sum, delta = _softmax_stats(
            q, g, k_base, v_base, k_stride, v_stride, length, qk_scale, HEAD_DIM, REST, BLOCK_M, BLOCK_N, PRECISION
        )
        if scale != 0.0:
            dq = _grad_looped(
                dq, shift, row_sum, delta, weight, q, g, k_base, v_base, dk_base, dv_base, k_stride, v_stride, partial_stride,
                length, qk_scale, softmax_scale, HEAD_DIM, REST, BLOCK_N, PRECISION,
            )  # fmt: skip
    if delta_base is not None:
        tl.store(delta_base + tl.arange(0, BLOCK_M), delta, mask=in_range)
    return dq


@triton.jit
def decoupled_attention_backward_kernel(
    dq_ptr, dk_ptrs, dv_ptrs, delta_ptrs, q_ptr, g_ptr, k_ptrs, v_ptrs, scale_ptr, mask_ptrs,
    q_strides, g_strides, k_strides, v_strides, scale_stride, mask_strides,
    heads, q_len, lengths, qk_scale, softmax_scale,
    HEAD_DIM: tl.constexpr, LENGTHS: tl.constexpr, RESTS: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # as in the forward: heads fastest, int64 before the first multiply
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    block = (tl.program_id(0) // heads).to(tl.int64)
    first = block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    in_range = rows < q_len - first
    # dQ is packed [B, M, H, D], the partial dK and dV [blocks, B, N, H, D]
    row_stride = heads * HEAD_DIM
    partial = block * tl.num_programs(1) + batch

    q_base = of_head(q_ptr, q_strides, batch, head, VECTOR) + first * q_strides[2] * VECTOR
    q = load_rows(q_base, q_strides[2] * VECTOR, in_range, HEAD_DIM, BLOCK_M, False)
    g_base = of_head(g_ptr, g_strides, batch, head, VECTOR) + first * g_strides[2] * VECTOR
    g = load_rows(g_base, g_strides[2] * VECTOR, in_range, HEAD_DIM, BLOCK_M, False)

    for i in tl.static_range(len(k_ptrs)):
        partial_offset = partial * lengths[i] * row_stride + head * HEAD_DIM
        if dk_ptrs[i] is None:
            dk_base = None
        else:
            dk_base = dk_ptrs[i] + partial_offset
        if dv_ptrs[i] is None:
            dv_base = None
        else:
            dv_base = dv_ptrs[i] + partial_offset
        k_base = of_head(k_ptrs[i], k_strides[i], batch, head, VECTOR)
        v_base = of_head(v_ptrs[i], v_strides[i], batch, head, VECTOR)
        if i == 0:
            dq = _text(
                q, g, k_base, v_base, dk_base, dv_base, k_strides[0][2] * VECTOR, v_strides[0][2] * VECTOR, row_stride,
                lengths[0], qk_scale, softmax_scale, HEAD_DIM, LENGTHS[0], RESTS[0], BLOCK_M, BLOCK_N, PRECISION,
            )  # fmt: skip
        else:
            scale = tl.load(scale_ptr + batch * scale_stride + (i - 1))
            if mask_ptrs[i - 1] is None:
                mask = None
            else:
                mask_base = mask_ptrs[i - 1] + batch * mask_strides[i - 1] + first
                mask = tl.load(mask_base + rows, mask=in_range, other=0.0).to(tl.float32)
            if delta_ptrs[i - 1] is None:
                # a branch of scale 0 is not read at all: it may hold anything, NaN included
                if scale != 0.0:
                    dq = _add_image(
                        dq, q, g, k_base, v_base, dk_base, dv_base, None,
                        k_strides[i][2] * VECTOR, v_strides[i][2] * VECTOR, row_stride,
                        lengths[i], scale, mask, in_range, qk_scale, softmax_scale,
                        HEAD_DIM, LENGTHS[i], RESTS[i], BLOCK_M, BLOCK_N, PRECISION,
                    )  # fmt: skip
            else:
                delta_base = delta_ptrs[i - 1] + (batch * heads + head) * q_len + first
                dq = _add_image(
                    dq, q, g, k_base, v_base, dk_base, dv_base, delta_base,
                    k_strides[i][2] * VECTOR, v_strides[i][2] * VECTOR, row_stride,
                    lengths[i], scale, mask, in_range, qk_scale, softmax_scale,
                    HEAD_DIM, LENGTHS[i], RESTS[i], BLOCK_M, BLOCK_N, PRECISION,
                )  # fmt: skip
            if scale == 0.0:
                if dk_ptrs[i] is not None:
                    store_zeros(dk_base, row_stride, lengths[i], HEAD_DIM)
                if dv_ptrs[i] is not None:
                    store_zeros(dv_base, row_stride, lengths[i], HEAD_DIM)

    store_rows(
        dq_ptr + (batch * q_len + first) * row_stride + head * HEAD_DIM, row_stride, in_range,
        scale_tiles(dq, softmax_scale), HEAD_DIM, BLOCK_M,
    )  # fmt: skip
