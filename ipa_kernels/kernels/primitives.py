"""What the kernels do with tiles: cut an extent into tiles, load rows, score keys, weigh values, store rows.

A head dim and a short branch are cut into tiles of 64, 32 and 16 (a head dim of 40 = 32 + 16, 160 = 64 + 64 + 32; 77 keys =
64 + 16) instead of being padded to the next power of two: tensor cores multiply in steps of 16, so this is the least work
that the shape allows. Everything cut along the head dim travels as a tuple of tiles.

A base points at the first row of a tile; what lies within the tile is addressed in 32 bits. In the shape comments, M is the
block of queries, N a tile of keys and D_d one tile of the head dim.
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


@triton.constexpr_function
def tile_fill(extent, index):
    """How much of the extent is in a tile: its width, or less in the last one."""
    begin, width = cut(extent)[index]
    return min(width, extent - begin)


@triton.constexpr_function
def tile_is_full(extent, index):
    return tile_fill(extent, index) == cut(extent)[index][1]


@triton.jit
def load_rows(base, row_stride, row_mask, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, FULL: tl.constexpr):
    """A tuple of tiles [ROWS, D_d]; zero beyond HEAD_DIM, and where row_mask [ROWS] is False (not read if FULL)."""
    tiles = ()
    for d in tl.static_range(tile_count(HEAD_DIM)):
        columns = tile_begin(HEAD_DIM, d) + tl.arange(0, tile_width(HEAD_DIM, d))
        pointers = base + tl.arange(0, ROWS)[:, None] * row_stride + columns[None, :]
        if tile_is_full(HEAD_DIM, d):
            if FULL:
                tile = tl.load(pointers)
            else:
                tile = tl.load(pointers, mask=row_mask[:, None], other=0.0)
        elif FULL:
            tile = tl.load(pointers, mask=(columns < HEAD_DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers, mask=row_mask[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store_rows(base, row_stride, in_range, tiles, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """The inverse of `load_rows`; this is where each value is rounded, once, to the type of `base`.

    Groups of eight columns are an axis of their own: that keeps the compiler for AMD from storing in the layout of the matrix
    units, 2 to 8 bytes per thread, and changes nothing for NVIDIA.
    """
    rows = tl.arange(0, ROWS)[:, None] * row_stride
    for d in tl.static_range(tile_count(HEAD_DIM)):
        groups = tile_begin(HEAD_DIM, d) + tl.arange(0, tile_width(HEAD_DIM, d) // 8) * 8
        pointers = base + (rows + groups[None, :])[:, :, None] + tl.arange(0, 8)[None, None, :]
        mask = in_range[:, None]
        if not tile_is_full(HEAD_DIM, d):
            mask = mask & (groups < HEAD_DIM)[None, :]
        values = tl.reshape(tiles[d].to(base.dtype.element_ty), [ROWS, tile_width(HEAD_DIM, d) // 8, 8])
        tl.store(pointers, values, mask=tl.broadcast_to(mask[:, :, None], values.shape))


@triton.jit
def multiply_rows(
    a, base, row_stride, remaining, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """a·Bᵗ [M, WIDTH], float32, of the rows B at `base`; 0 from row `remaining` on, unless the tile is FULL."""
    b = load_rows(base, row_stride, tl.arange(0, WIDTH) < remaining, HEAD_DIM, WIDTH, FULL)
    products = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for d in tl.static_range(1, tile_count(HEAD_DIM)):
        products = tl.dot(a[d], tl.trans(b[d]), products, input_precision=PRECISION)
    return products


@triton.jit
def score_keys(
    q, k_base, k_stride, remaining, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Scores [M, WIDTH] of the keys at `k_base`, unscaled, float32; -inf from key `remaining` on, unless the tile is FULL."""
    scores = multiply_rows(q, k_base, k_stride, remaining, HEAD_DIM, WIDTH, FULL, PRECISION)
    if not FULL:
        scores = tl.where((tl.arange(0, WIDTH) < remaining)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def weigh_values(
    acc, p, v_base, v_stride, remaining,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + p·V over the values at `v_base`, as a tuple of tiles [M, D_d]; p [M, WIDTH] is rounded to the type of V."""
    v = load_rows(v_base, v_stride, tl.arange(0, WIDTH) < remaining, HEAD_DIM, WIDTH, FULL)
    return weigh_rows(acc, p.to(v_base.dtype.element_ty), v, HEAD_DIM, PRECISION)


@triton.jit
def weigh_rows(acc, weights, rows, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights·rows, as a tuple of tiles [M, D_d]; weights [M, N] of the type of the rows."""
    out = ()
    for d in tl.static_range(tile_count(HEAD_DIM)):
        out = out + (tl.dot(weights, rows[d], acc[d], input_precision=PRECISION),)
    return out


@triton.jit
def of_head(pointer, strides, batch, head, VECTOR: tl.constexpr):
    """Where a head begins; batch and head are int64, strides of batch, head and row in units of VECTOR elements, 16 bytes."""
    return pointer + (batch * strides[0] + head * strides[1]) * VECTOR


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
def scale_rows(tiles, factor):
    """tiles · factor, with one factor [M] per row."""
    out = ()
    for t in tl.static_range(len(tiles)):
        out = out + (tiles[t] * factor[:, None],)
    return out


@triton.jit
def scale_tiles(tiles, factor):
    """tiles · factor, with a factor that broadcasts to each of them."""
    out = ()
    for t in tl.static_range(len(tiles)):
        out = out + (tiles[t] * factor,)
    return out


@triton.jit
def add_scaled_rows(acc, tiles, factor):
    """acc + tiles · factor, with one factor [M] per row, rounded once."""
    out = ()
    for t in tl.static_range(len(tiles)):
        out = out + (tl.fma(tiles[t], tl.broadcast_to(factor[:, None], tiles[t].shape), acc[t]),)
    return out
