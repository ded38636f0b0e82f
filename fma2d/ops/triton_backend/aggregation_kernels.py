"""The aggregation's kernels on the way up, from tokens to summary tokens, and what those of the way back share.

A level reads a *source*: number 0 is the tokens, number `j` their sums over blocks of `2**j` a side, which `summarise`
makes on the way up as far as `SOURCES`; coarser levels read the last. So a bin of level `l` is `2**(l - 1 - j)` units
of its source a side. A tile is a run of cells of all images, all channels of one head of one kind; its rows are pairs
of units side by side, loaded as an even and an odd column. Rows of units are added up under the vertical kernel first,
what remains of a cell then under the horizontal one. A grid of one axis is a row of cells one token high.

The tokens have strides of their own; block sums and the gradients of any source are `[kinds, B, rows, columns, heads,
channels]`, float32. Summary tokens of all levels are `[kinds, B, entries, heads, channels]`, see `indexing`. Kernels
are read from *tables* `[levels, kinds, axes, BINS, RANK, heads, channels]`, float32: channels together. Kinds are keys,
values, queries. All arithmetic is in float32.
"""

import triton
import triton.language as tl

from .indexing import SIZES

# A gradient is scaled by no more for an axis: the product of two is finite, and so is that with the gradient 0 of a
# summary that stands for no token.
MOST = tl.constexpr(1e18)


@triton.jit
def cells_of(tile, batch, cells_y, cells_x, CELLS: tl.constexpr, ROWS: tl.constexpr):
    """The cell of each of a tile's rows: image, row, column, and whether there is one."""
    cell = tile * CELLS + tl.arange(0, ROWS) // (ROWS // CELLS)
    image = cell // (cells_x * cells_y)
    return image, cell // cells_x % cells_y, cell % cells_x, image < batch


@triton.jit
def extents_of(height, width, side, NDIM: tl.constexpr):
    """Squares of a side, in rows and columns; a grid of one axis has one row."""
    return tl.cdiv(height, side) if NDIM == 2 else 1, tl.cdiv(width, side)


@triton.jit
def first_entry(level, height, width, BINS: tl.constexpr, RANK: tl.constexpr, NDIM: tl.constexpr):
    """The first entry of a level's lattice."""
    start = 0
    for lower in range(1, level):
        cells_y, cells_x = extents_of(height, width, BINS << (lower - 1), NDIM)
        start += cells_y * cells_x * RANK
    return start


@triton.jit
def table_of(tables, level, which, AXIS: tl.constexpr, heads, BINS: tl.constexpr, RANK: tl.constexpr,
           HEAD_DIM: tl.constexpr, KINDS: tl.constexpr, NDIM: tl.constexpr):  # fmt: skip
    """Where the weights of a level along an axis begin; AXIS 0 is vertical, 1 horizontal."""
    axis = ((level - 1) * KINDS + which) * NDIM + AXIS + NDIM - 2
    return tables + axis * BINS * RANK * heads * HEAD_DIM


@triton.jit
def weights_of(table, bin, k, heads, head, d, BINS: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Weights of a bin, 0 beyond the last; the shapes of `bin`, `k` and `d` broadcast."""
    at = ((bin * RANK + k) * heads + head) * HEAD_DIM + d
    return tl.load(table + at, (bin < BINS) & (k < RANK) & (d < HEAD_DIM), 0.0)


@triton.jit
def summary_at(
    which, image, start, cy, cx, k, batch, entries, cells_x, heads, head, d,
    PARTS_X: tl.constexpr, PARTS_Y: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Where summary tokens `k` of cells lie."""
    entry = start + (cy * PARTS_Y + k // PARTS_X) * (cells_x * PARTS_X) + cx * PARTS_X + k % PARTS_X
    return (((which * batch + image).to(tl.int64) * entries + entry) * heads + head) * HEAD_DIM + d


@triton.jit
def tokens_of(first, unit, extent):
    """How many of the `unit` tokens of an axis from `first` on lie in the grid."""
    return tl.minimum(tl.maximum(extent - first, 0), unit).to(tl.float32)


@triton.jit
def ratio(x, left):
    """`x / left`, and 0 where nothing is left."""
    return tl.where(left > 0, x / tl.where(left > 0, left, 1.0), 0.0)


@triton.jit
def axis_factor(
    table, cell, k, heads, head, d, tokens, extent, BINS: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """What an axis scales cells by for what the grid's end cuts off, `[cells, ranks, channels]`; `tokens` of a bin."""
    whole = tl.zeros([1, k.shape[1], d.shape[2]], tl.float32)
    left = tl.zeros([cell.shape[0], k.shape[1], d.shape[2]], tl.float32)
    for i in range(BINS):
        size = tl.abs(weights_of(table, i, k, heads, head, d, BINS, RANK, HEAD_DIM))
        whole += size * tokens
        left += size * tokens_of((cell * BINS + i) * tokens, tokens, extent)[:, None, None]
    full = (cell + 1) * BINS * tokens <= extent
    return tl.where(full[:, None, None], 1.0, tl.minimum(ratio(whole, left), 1e38))


@triton.jit
def over_cells(x, CELLS: tl.constexpr, PAIRS: tl.constexpr):
    """Sum `[cells * pairs, ranks, channels]` over the pairs of each cell."""
    return tl.sum(tl.reshape(x, [CELLS, PAIRS, x.shape[1], x.shape[2]]), 1)


@triton.jit
def scale_of(level, BINS: tl.constexpr, NDIM: tl.constexpr):
    """What turns densities into weights: a token's share of a cell."""
    share = 1.0 / (BINS << (level - 1))
    return share * share if NDIM == 2 else share


@triton.jit(do_not_specialize=SIZES)
def lay_out(
    kernels,  # [learned, kinds, axes, RANK, heads, channels, BINS] of these strides; None: the start value
    tables, strides, learned, heads, BINS: tl.constexpr, BLOCK_B: tl.constexpr, RANK: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, KINDS: tl.constexpr,
    NDIM: tl.constexpr,
):  # fmt: skip
    """The kernels of one level, kind, axis, summary token and head, as the tables have them."""
    pid = tl.program_id(0)
    head, k, axis = pid % heads, pid // heads % RANK, pid // (heads * RANK) % NDIM
    which, level = pid // (heads * RANK * NDIM) % KINDS, pid // (heads * RANK * NDIM * KINDS)
    bin, d = tl.arange(0, BLOCK_B)[:, None], tl.arange(0, BLOCK_D)[None, :]
    there = (bin < BINS) & (d < HEAD_DIM)
    if kernels is None:
        parts, part = PARTS_X, k % PARTS_X
        if NDIM == 2:
            parts, part = tl.where(axis == 0, PARTS_Y, PARTS_X), tl.where(axis == 0, k // PARTS_X, k % PARTS_X)
        weights = tl.where((bin * parts // BINS == part) & there, parts, 0).to(tl.float32)
    else:
        at = kernels + tl.minimum(level, learned - 1) * strides[0] + which * strides[1] + axis * strides[2]
        at += k * strides[3] + head * strides[4] + d * strides[5] + bin * strides[6]
        weights = tl.load(at, there, 0.0).to(tl.float32)
    to = (((level * KINDS + which) * NDIM + axis) * BINS + bin) * RANK + k
    tl.store(tables + (to * heads + head) * HEAD_DIM + d, weights, there)


@triton.jit
def level_of(group, levels, batch, height, width, BINS: tl.constexpr, CELLS: tl.constexpr, NDIM: tl.constexpr):
    """The level of a program and its tile in it, given its number; the coarsest first, whose programs take longest."""
    level = levels
    cells_y, cells_x = extents_of(height, width, BINS << (level - 1), NDIM)
    while group >= tl.cdiv(batch * cells_y * cells_x, CELLS):
        group -= tl.cdiv(batch * cells_y * cells_x, CELLS)
        level -= 1
        cells_y, cells_x = extents_of(height, width, BINS << (level - 1), NDIM)
    return level, group, cells_y, cells_x


@triton.jit(do_not_specialize=SIZES)
def summarise(
    x0, x1, x2,  # FIRST: tokens of each kind; else block sums of sources 1 and 2
    tables,
    out,  # summary tokens of all levels
    factors,  # what each of them was scaled by for what is missing of its cell, float32; None: not kept
    blocks1, blocks2,  # sources that level 1 makes; None: not wanted
    strides0, strides1, strides2,  # of tokens
    batch, heads, height, width, entries, levels,
    KINDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, BLOCK_P: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, BINS: tl.constexpr, NDIM: tl.constexpr, SOURCES: tl.constexpr,
    FIRST: tl.constexpr, CUT: tl.constexpr, CELLS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The summary tokens of a tile of cells: with FIRST of level 1, else of any level above; CUT: some lack tokens."""
    ROWS: tl.constexpr = CELLS * PAIRS
    TWICE: tl.constexpr = 2 if FIRST and blocks2 is not None and NDIM == 2 else 1
    pid = tl.program_id(0)
    head, which, group = pid % heads, pid // heads % KINDS, pid // (heads * KINDS)
    if FIRST:
        level, tile = 1, group
        cells_y, cells_x = extents_of(height, width, BINS, NDIM)
        rows, columns = height, width
        x, strides = x0, strides0
        if which == 1:
            x, strides = x1, strides1
        if KINDS == 3:  # noqa: SIM102 (of the compiler, then of the call)
            if which == 2:
                x, strides = x2, strides2
        side: tl.constexpr = BINS
        shift: tl.constexpr = 0
        start: tl.constexpr = 0
        stride_b, stride_h, stride_y, stride_x = strides[0], strides[1], strides[2], strides[3]
    else:
        level, tile, cells_y, cells_x = level_of(group, levels, batch, height, width, BINS, CELLS, NDIM)
        number = tl.minimum(level - 1, SOURCES)
        x = x0
        if SOURCES == 2:  # noqa: SIM102 (of the compiler, then of the call)
            if number == 2:
                x = x1
        rows, columns = extents_of(height, width, 1 << number, NDIM)
        shift = level - 1 - number
        side = BINS << shift
        start = first_entry(level, height, width, BINS, RANK, NDIM)
        stride_h, stride_x, stride_y = HEAD_DIM, heads * HEAD_DIM, columns * heads * HEAD_DIM
        stride_b = rows * stride_y
        x += (which * batch).to(tl.int64) * stride_b
    side_y = side if NDIM == 2 else 1
    image, cy, cx, real = cells_of(tile, batch, cells_y, cells_x, CELLS, ROWS)
    pair = tl.arange(0, ROWS) % PAIRS
    d = tl.arange(0, BLOCK_D)[None, :]
    k3, d3 = tl.arange(0, BLOCK_P)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    x += (image.to(tl.int64) * stride_b + head * stride_h)[:, None] + d
    table_y = table_of(tables, level, which, 0, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
    table_x = table_of(tables, level, which, 1, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)

    # Weights are loaded for every row, so that a row's ranks lie in one thread.
    same = tl.zeros([ROWS, 1, 1], tl.int32)
    summary = tl.zeros([CELLS, BLOCK_P, BLOCK_D], tl.float32)
    for begin in range(0, side, 2 * PAIRS):
        unit = begin + 2 * pair
        column = cx * side + unit
        is_even = real & (unit < side) & (column < columns)
        is_odd = is_even & (column + 1 < columns)
        even = tl.zeros([ROWS, BLOCK_P, BLOCK_D], tl.float32)
        odd = even
        for row in range(0, side_y, TWICE * NDIM):
            quad = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for j in tl.static_range(TWICE):
                block = tl.zeros([ROWS, BLOCK_D], tl.float32)
                for i in tl.static_range(NDIM):
                    up = row + j * NDIM + i
                    y = cy * side_y + up
                    at = x + (y.to(tl.int64) * stride_y + column * stride_x)[:, None]
                    inside = (y < rows)[:, None] & (d < HEAD_DIM)
                    x_even = tl.load(at, is_even[:, None] & inside, 0.0).to(tl.float32)
                    x_odd = tl.load(at + stride_x, is_odd[:, None] & inside, 0.0).to(tl.float32)
                    if NDIM == 2:
                        weight = weights_of(table_y, (up >> shift) + same, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
                        even += weight * x_even[:, None, :]
                        odd += weight * x_odd[:, None, :]
                    else:
                        even += x_even[:, None, :]
                        odd += x_odd[:, None, :]
                    block += x_even + x_odd
                if FIRST and blocks1 is not None:
                    to_y, to_x = (cy * side_y + row) // NDIM + j, column // 2
                    to_rows, to_columns = extents_of(height, width, 2, NDIM)
                    to = ((which * batch + image).to(tl.int64) * to_rows + to_y) * to_columns + to_x
                    to = (to * heads + head)[:, None] * HEAD_DIM + d
                    tl.store(blocks1 + to, block, (is_even & (to_y < to_rows))[:, None] & (d < HEAD_DIM))
                quad += block
            if FIRST and blocks2 is not None:
                image2, cy2, cx2, real2 = cells_of(tile, batch, cells_y, cells_x, CELLS, ROWS // 2)
                unit2 = begin + 4 * (tl.arange(0, ROWS // 2) % (PAIRS // 2))
                to_y, to_x = (cy2 * side_y + row) // (2 * TWICE), (cx2 * side + unit2) // 4
                to_rows, to_columns = extents_of(height, width, 4, NDIM)
                to = ((which * batch + image2).to(tl.int64) * to_rows + to_y) * to_columns + to_x
                to = (to * heads + head)[:, None] * HEAD_DIM + d
                wanted = real2 & (unit2 < side) & (to_y < to_rows) & (to_x < to_columns)
                quad2 = tl.sum(tl.reshape(quad, [ROWS // 2, 2, BLOCK_D]), 1)
                tl.store(blocks2 + to, quad2, wanted[:, None] & (d < HEAD_DIM))
        unit3 = unit[:, None, None]
        weight_even = weights_of(table_x, unit3 >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
        weight_odd = weights_of(table_x, (unit3 + 1) >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
        summary += over_cells(even * weight_even + odd * weight_odd, CELLS, PAIRS)

    image, cy, cx, real = cells_of(tile, batch, cells_y, cells_x, CELLS, CELLS)
    to = summary_at(
        which, image[:, None, None], start, cy[:, None, None], cx[:, None, None], k3, batch, entries, cells_x, heads,
        head, d3, PARTS_X, PARTS_Y, HEAD_DIM,
    )  # fmt: skip
    wanted = real[:, None, None] & (k3 < RANK) & (d3 < HEAD_DIM)
    if CUT:
        tokens = 1 << (level - 1)
        factor = axis_factor(table_x, cx, k3, heads, head, d3, tokens, width, BINS, RANK, HEAD_DIM)
        summary *= factor
        factor = tl.minimum(factor, MOST)
        if NDIM == 2:
            axis = axis_factor(table_y, cy, k3, heads, head, d3, tokens, height, BINS, RANK, HEAD_DIM)
            summary *= axis
            factor *= tl.minimum(axis, MOST)
        if factors is not None:
            tl.store(factors + to, factor, wanted)
    summary *= scale_of(level, BINS, NDIM)
    tl.store(out + to, summary.to(out.dtype.element_ty), wanted)
