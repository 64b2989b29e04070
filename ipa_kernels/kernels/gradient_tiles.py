"""One tile of keys of the backward: its part of dQ, and its partial sums of dK and dV. The formulas are in `backward.py`."""

import triton
import triton.language as tl

from .primitives import load_rows, scale_tiles, store_rows, tile_count, weigh_rows, zero_rows


@triton.jit
def float16_unit(size):
    """What to divide numbers of up to this size by, so that float16 can hold them; 1 where all are 0.

    size [M, 1] or [1, 1]: the compiler for tcgen05 fails on the maximum of a tensor of one dimension, and on a number.
    """
    # not below 2**-100: accumulators are divided by it
    return tl.where(size == 0.0, 1.0, tl.maximum(size, 7.888609e-31))


@triton.jit
def store_partial(
    base, stride, row_mask, weights, rows, factor,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This program's partial sum over its queries, weightsᵗ·rows·factor [WIDTH, D]; weights [M, WIDTH], of the rows' type."""
    transposed = tl.trans(weights)
    # always so: in a region of their own these products, which contract over queries, get a layout of their own, and their
    # operands are not held in registers from one tile of keys to the next
    if stride > 0:
        out = ()
        for d in tl.static_range(tile_count(HEAD_DIM)):
            out = out + (tl.dot(transposed, rows[d], input_precision=PRECISION) * factor,)
        store_rows(base, stride, row_mask, out, HEAD_DIM, WIDTH)


@triton.jit
def grad_tile(
    dq, p, r, delta, weight, q, g, k_base, dk_base, dv_base, k_stride, partial_stride, begin, remaining, softmax_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ/scale + S·K over the tile of keys at `begin`; partial dK and dV are stored, unless their bases are None.

    weight [M], or None for 1.
    """
    row_mask = tl.arange(0, WIDTH) < remaining
    s = p * (r - delta[:, None])
    if weight is not None:
        s = s * weight[:, None]
        p = p * weight[:, None]
    k = load_rows(k_base + begin * k_stride.to(tl.int64), k_stride, row_mask, HEAD_DIM, WIDTH, FULL)
    offset = begin * partial_stride.to(tl.int64)
    if k_base.dtype.element_ty != tl.float16:
        s = s.to(k_base.dtype.element_ty)
        dq = weigh_rows(dq, s, k, HEAD_DIM, PRECISION)
        if dk_base is not None:
            store_partial(dk_base + offset, partial_stride, row_mask, s, q, softmax_scale, HEAD_DIM, WIDTH, PRECISION)
        if dv_base is not None:
            p = p.to(k_base.dtype.element_ty)
            store_partial(dv_base + offset, partial_stride, row_mask, p, g, 1.0, HEAD_DIM, WIDTH, PRECISION)
    else:
        # S is of any size, and so is a weight: what float16 holds is their ratio to the largest
        unit = tl.max(tl.abs(s), 1, keep_dims=True)
        if dk_base is not None:
            # one for all rows: dK is a sum over them
            unit = tl.max(unit, 0, keep_dims=True)
        unit = float16_unit(unit)
        s = (s * (1.0 / unit)).to(tl.float16)
        dq = scale_tiles(weigh_rows(scale_tiles(dq, 1.0 / unit), s, k, HEAD_DIM, PRECISION), unit)
        if dk_base is not None:
            store_partial(dk_base + offset, partial_stride, row_mask, s, q, unit * softmax_scale, HEAD_DIM, WIDTH, PRECISION)
        if dv_base is not None:
            if weight is None:
                store_partial(dv_base + offset, partial_stride, row_mask, p.to(tl.float16), g, 1.0, HEAD_DIM, WIDTH, PRECISION)
            else:
                unit = float16_unit(tl.max(tl.abs(weight)[:, None], 0, keep_dims=True))
                p = (p * (1.0 / unit)).to(tl.float16)
                store_partial(dv_base + offset, partial_stride, row_mask, p, g, unit, HEAD_DIM, WIDTH, PRECISION)
    return dq


@triton.jit
def store_zeros(base, row_stride, length, HEAD_DIM: tl.constexpr):
    """Zeros for the partial sums of a branch that is not read."""
    for begin in tl.range(0, length, 16):
        row_mask = tl.arange(0, 16) < length - begin
        store_rows(base + begin * row_stride.to(tl.int64), row_stride, row_mask, zero_rows(HEAD_DIM, 16), HEAD_DIM, 16)
