"""Named moves on tiles: cut an extent into tiles, load rows, score keys, weigh values, store rows.

A head dim and a short branch are cut into tiles of 64, 32 and 16 (a head dim of 40 = 32 + 16, 160 = 64 + 64 + 32; 77 keys =
64 + 16) instead of being padded to the next power of two: tensor cores multiply in steps of 16, so this is the least work
that the shape allows. Everything cut along the head dim travels as a tuple of tiles.

In the shape comments, M is the block of queries, N a tile of keys and D_d one tile of the head dim.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def cut(extent):
    """((begin, width), ...) over an extent rounded up to 16: tiles of 64, then one of 32 and one of 16 where needed."""
    tiles = []
    begin = 0
    padded = (extent + 15) // 16 * 16
    for width in (64, 32, 16):
        while begin + width <= padded:
            tiles.append((begin, width))
            begin += width
    return tuple(tiles)


# A jit function can pass integers on, but not nested tuples: hence one accessor for each number.
@triton.constexpr_function
def tile_count(extent):
    return len(cut(extent))


@triton.constexpr_function
def tile_begin(extent, index):
    return cut(extent)[index][0]


@triton.constexpr_function
def tile_width(extent, index):
    return cut(extent)[index][1]


@triton.jit
def multiple(stride, ALIGN: tl.constexpr):
    """The stride, in a form that shows the compiler that ALIGN divides it (the launcher has checked); 1 says nothing.

    Arguments are only specialised on multiples of 16 and `tl.multiple_of` has no effect on an argument: without this, the
    head stride of 40 of SD 1.5 costs every 16-byte load and store.
    """
    if ALIGN > 1:
        return stride // ALIGN * ALIGN
    else:
        return stride


@triton.jit
def load_rows(base, row_stride, rows, in_range, HEAD_DIM: tl.constexpr):
    """Rows [R, HEAD_DIM] as a tuple of tiles [R, D_d]; zero where a row or a column does not exist."""
    tiles = ()
    for d in tl.static_range(tile_count(HEAD_DIM)):
        columns = tile_begin(HEAD_DIM, d) + tl.arange(0, tile_width(HEAD_DIM, d))
        pointers = base + rows[:, None] * row_stride + columns[None, :]
        mask = in_range[:, None]
        if tile_begin(HEAD_DIM, d) + tile_width(HEAD_DIM, d) > HEAD_DIM:
            mask = mask & (columns < HEAD_DIM)[None, :]
        tiles = tiles + (tl.load(pointers, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_rows(base, row_stride, rows, in_range, tiles, HEAD_DIM: tl.constexpr):
    """The inverse of `load_rows`; this is where each value is rounded, once, to the type of `base`."""
    for d in tl.static_range(tile_count(HEAD_DIM)):
        columns = tile_begin(HEAD_DIM, d) + tl.arange(0, tile_width(HEAD_DIM, d))
        pointers = base + rows[:, None] * row_stride + columns[None, :]
        mask = in_range[:, None] & (columns < HEAD_DIM)[None, :]
        tl.store(pointers, tiles[d].to(base.dtype.element_ty), mask=mask)


@triton.jit
def score_keys(q, k_base, k_stride, begin, length, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [M, WIDTH] of the keys from `begin` on, unscaled, float32; -inf from `length` on."""
    keys = begin + tl.arange(0, WIDTH)
    k = load_rows(k_base, k_stride, keys.to(tl.int64), keys < length, HEAD_DIM)
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    for d in tl.static_range(1, tile_count(HEAD_DIM)):
        scores = tl.dot(q[d], tl.trans(k[d]), scores, input_precision=PRECISION)
    return tl.where((keys < length)[None, :], scores, float("-inf"))


@triton.jit
def weigh_values(acc, p, v_base, v_stride, begin, length, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """acc + p·V over the keys from `begin` on, as a tuple of tiles [M, D_d]; p is rounded to the type of V."""
    keys = begin + tl.arange(0, WIDTH)
    v = load_rows(v_base, v_stride, keys.to(tl.int64), keys < length, HEAD_DIM)
    out = ()
    for d in tl.static_range(tile_count(HEAD_DIM)):
        out = out + (tl.dot(p.to(v[d].dtype), v[d], acc[d], input_precision=PRECISION),)
    return out


@triton.jit
def exp2_scaled(scores, scale, shift):
    """2**(scores·scale - shift) in one rounding of the exponent; scores [M, N], shift [M]."""
    return tl.exp2(tl.fma(scores, tl.full(scores.shape, scale, tl.float32), tl.broadcast_to(-shift[:, None], scores.shape)))


@triton.jit
def zero_rows(HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """A tuple of float32 tiles [BLOCK_M, D_d] of zeros."""
    tiles = ()
    for d in tl.static_range(tile_count(HEAD_DIM)):
        tiles = tiles + (tl.full([BLOCK_M, tile_width(HEAD_DIM, d)], 0.0, tl.float32),)
    return tiles


@triton.jit
def scale_rows(tiles, factor, HEAD_DIM: tl.constexpr):
    """tiles · factor, with one factor [M] per row."""
    out = ()
    for d in tl.static_range(tile_count(HEAD_DIM)):
        out = out + (tiles[d] * factor[:, None],)
    return out


@triton.jit
def add_scaled_rows(acc, tiles, factor, HEAD_DIM: tl.constexpr):
    """acc + tiles · factor, with one factor [M] per row, rounded once."""
    out = ()
    for d in tl.static_range(tile_count(HEAD_DIM)):
        out = out + (tl.fma(tiles[d], tl.broadcast_to(factor[:, None], tiles[d].shape), acc[d]),)
    return out
