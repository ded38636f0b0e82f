"""The aggregation's kernels: tokens to summary tokens, and the gradients of both tokens and kernels.

A level reads a *source*: number 0 is the tokens, number `j` their sums over blocks of `2**j` a side, which `summarise`
makes on the way up as far as `SOURCES`; coarser levels read the last. So a bin of level `l` is `2**(l - 1 - j)` units
of its source a side. A tile is a run of cells of all images, all channels of one head of one kind; its rows are pairs
of units side by side, loaded as an even and an odd column. Rows of units are added up under the vertical kernel first,
what remains of a cell then under the horizontal one. A grid of one axis is a row of cells one token high.

The tokens have strides of their own; block sums and the gradients of any source are `[kinds, B, rows, columns, heads,
channels]`, float32. Summary tokens of all levels are `[kinds, B, entries, heads, channels]`, see `indexing`. Kernels are
read from *tables* `[levels, kinds, axes, BINS, RANK, heads, channels]`, float32: channels together. Kinds are keys,
values, queries. All arithmetic is in float32.
"""

import triton
import triton.language as tl

from .indexing import SIZES

# A gradient is scaled by no more for an axis: the product of two is finite, and so is that with the gradient 0 of a
# summary that stands for no token.
MOST = tl.constexpr(1e18)


@triton.jit
def _choose(which, x0, x1, x2):
    """One of three pointers or numbers."""
    x = x0
    if which == 1:
        x = x1
    if which == 2:
        x = x2
    return x


@triton.jit
def _cells(tile, batch, cells_y, cells_x, CELLS: tl.constexpr, ROWS: tl.constexpr):
    """The cell of each of a tile's rows: image, row, column, and whether there is one."""
    cell = tile * CELLS + tl.arange(0, ROWS) // (ROWS // CELLS)
    image = cell // (cells_x * cells_y)
    return image, cell // cells_x % cells_y, cell % cells_x, image < batch


@triton.jit
def _extents(height, width, side, NDIM: tl.constexpr):
    """Squares of a side, in rows and columns; a grid of one axis has one row."""
    return tl.cdiv(height, side) if NDIM == 2 else 1, tl.cdiv(width, side)


@triton.jit
def _first_entry(level, height, width, BINS: tl.constexpr, RANK: tl.constexpr, NDIM: tl.constexpr):
    """The first entry of a level's lattice."""
    start = 0
    for lower in range(1, level):
        cells_y, cells_x = _extents(height, width, BINS << (lower - 1), NDIM)
        start += cells_y * cells_x * RANK
    return start


@triton.jit
def _table(tables, level, which, AXIS: tl.constexpr, heads, BINS: tl.constexpr, RANK: tl.constexpr,
           HEAD_DIM: tl.constexpr, KINDS: tl.constexpr, NDIM: tl.constexpr):  # fmt: skip
    """Where the weights of a level along an axis begin; AXIS 0 is vertical, 1 horizontal."""
    axis = ((level - 1) * KINDS + which) * NDIM + AXIS + NDIM - 2
    return tables + axis * BINS * RANK * heads * HEAD_DIM


@triton.jit
def _weights(table, bin, k, heads, head, d, BINS: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Weights of a bin, 0 beyond the last; the shapes of `bin`, `k` and `d` broadcast."""
    at = ((bin * RANK + k) * heads + head) * HEAD_DIM + d
    return tl.load(table + at, (bin < BINS) & (k < RANK) & (d < HEAD_DIM), 0.0)


@triton.jit
def _summary_at(
    which, image, start, cy, cx, k, batch, entries, cells_x, heads, head, d,
    PARTS_X: tl.constexpr, PARTS_Y: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Where summary tokens `k` of cells lie."""
    entry = start + (cy * PARTS_Y + k // PARTS_X) * (cells_x * PARTS_X) + cx * PARTS_X + k % PARTS_X
    return (((which * batch + image).to(tl.int64) * entries + entry) * heads + head) * HEAD_DIM + d


@triton.jit
def _tokens(first, unit, extent):
    """How many of the `unit` tokens of an axis from `first` on lie in the grid."""
    return tl.minimum(tl.maximum(extent - first, 0), unit).to(tl.float32)


@triton.jit
def _ratio(x, left):
    """`x / left`, and 0 where nothing is left."""
    return tl.where(left > 0, x / tl.where(left > 0, left, 1.0), 0.0)


@triton.jit
def _axis_factor(
    table, cell, k, heads, head, d, tokens, extent, BINS: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """What an axis scales cells by for what the grid's end cuts off, `[cells, ranks, channels]`; `tokens` of a bin."""
    whole = tl.zeros([1, k.shape[1], d.shape[2]], tl.float32)
    left = tl.zeros([cell.shape[0], k.shape[1], d.shape[2]], tl.float32)
    for i in range(BINS):
        size = tl.abs(_weights(table, i, k, heads, head, d, BINS, RANK, HEAD_DIM))
        whole += size * tokens
        left += size * _tokens((cell * BINS + i) * tokens, tokens, extent)[:, None, None]
    full = (cell + 1) * BINS * tokens <= extent
    return tl.where(full[:, None, None], 1.0, tl.minimum(_ratio(whole, left), 1e38))


@triton.jit
def _over_cells(x, CELLS: tl.constexpr, PAIRS: tl.constexpr):
    """Sum `[cells * pairs, ranks, channels]` over the pairs of each cell."""
    return tl.sum(tl.reshape(x, [CELLS, PAIRS, x.shape[1], x.shape[2]]), 1)


@triton.jit
def _scale(level, BINS: tl.constexpr, NDIM: tl.constexpr):
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
def _level_of(group, levels, batch, height, width, BINS: tl.constexpr, CELLS: tl.constexpr, NDIM: tl.constexpr):
    """The level of a program and its tile in it, given its number; the coarsest first, whose programs take longest."""
    level = levels
    cells_y, cells_x = _extents(height, width, BINS << (level - 1), NDIM)
    while group >= tl.cdiv(batch * cells_y * cells_x, CELLS):
        group -= tl.cdiv(batch * cells_y * cells_x, CELLS)
        level -= 1
        cells_y, cells_x = _extents(height, width, BINS << (level - 1), NDIM)
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
        cells_y, cells_x = _extents(height, width, BINS, NDIM)
        rows, columns = height, width
        x, strides = x0, strides0
        if which == 1:
            x, strides = x1, strides1
        if KINDS == 3:
            if which == 2:
                x, strides = x2, strides2
        side: tl.constexpr = BINS
        shift: tl.constexpr = 0
        start: tl.constexpr = 0
        stride_b, stride_h, stride_y, stride_x = strides[0], strides[1], strides[2], strides[3]
    else:
        level, tile, cells_y, cells_x = _level_of(group, levels, batch, height, width, BINS, CELLS, NDIM)
        number = tl.minimum(level - 1, SOURCES)
        x = x0
        if SOURCES == 2:
            if number == 2:
                x = x1
        rows, columns = _extents(height, width, 1 << number, NDIM)
        shift = level - 1 - number
        side = BINS << shift
        start = _first_entry(level, height, width, BINS, RANK, NDIM)
        stride_h, stride_x, stride_y = HEAD_DIM, heads * HEAD_DIM, columns * heads * HEAD_DIM
        stride_b = rows * stride_y
        x += (which * batch).to(tl.int64) * stride_b
    side_y = side if NDIM == 2 else 1
    image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, ROWS)
    pair = tl.arange(0, ROWS) % PAIRS
    d = tl.arange(0, BLOCK_D)[None, :]
    k3, d3 = tl.arange(0, BLOCK_P)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    x += (image.to(tl.int64) * stride_b + head * stride_h)[:, None] + d
    table_y = _table(tables, level, which, 0, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
    table_x = _table(tables, level, which, 1, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)

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
                        weight = _weights(table_y, (up >> shift) + same, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
                        even += weight * x_even[:, None, :]
                        odd += weight * x_odd[:, None, :]
                    else:
                        even += x_even[:, None, :]
                        odd += x_odd[:, None, :]
                    block += x_even + x_odd
                if FIRST and blocks1 is not None:
                    to_y, to_x = (cy * side_y + row) // NDIM + j, column // 2
                    to_rows, to_columns = _extents(height, width, 2, NDIM)
                    to = ((which * batch + image).to(tl.int64) * to_rows + to_y) * to_columns + to_x
                    to = (to * heads + head)[:, None] * HEAD_DIM + d
                    tl.store(blocks1 + to, block, (is_even & (to_y < to_rows))[:, None] & (d < HEAD_DIM))
                quad += block
            if FIRST and blocks2 is not None:
                image2, cy2, cx2, real2 = _cells(tile, batch, cells_y, cells_x, CELLS, ROWS // 2)
                unit2 = begin + 4 * (tl.arange(0, ROWS // 2) % (PAIRS // 2))
                to_y, to_x = (cy2 * side_y + row) // (2 * TWICE), (cx2 * side + unit2) // 4
                to_rows, to_columns = _extents(height, width, 4, NDIM)
                to = ((which * batch + image2).to(tl.int64) * to_rows + to_y) * to_columns + to_x
                to = (to * heads + head)[:, None] * HEAD_DIM + d
                wanted = real2 & (unit2 < side) & (to_y < to_rows) & (to_x < to_columns)
                quad2 = tl.sum(tl.reshape(quad, [ROWS // 2, 2, BLOCK_D]), 1)
                tl.store(blocks2 + to, quad2, wanted[:, None] & (d < HEAD_DIM))
        unit3 = unit[:, None, None]
        weight_even = _weights(table_x, unit3 >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
        weight_odd = _weights(table_x, (unit3 + 1) >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
        summary += _over_cells(even * weight_even + odd * weight_odd, CELLS, PAIRS)

    image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, CELLS)
    to = _summary_at(
        which, image[:, None, None], start, cy[:, None, None], cx[:, None, None], k3, batch, entries, cells_x, heads,
        head, d3, PARTS_X, PARTS_Y, HEAD_DIM,
    )  # fmt: skip
    wanted = real[:, None, None] & (k3 < RANK) & (d3 < HEAD_DIM)
    if CUT:
        tokens = 1 << (level - 1)
        factor = _axis_factor(table_x, cx, k3, heads, head, d3, tokens, width, BINS, RANK, HEAD_DIM)
        summary *= factor
        factor = tl.minimum(factor, MOST)
        if NDIM == 2:
            axis = _axis_factor(table_y, cy, k3, heads, head, d3, tokens, height, BINS, RANK, HEAD_DIM)
            summary *= axis
            factor *= tl.minimum(axis, MOST)
        if factors is not None:
            tl.store(factors + to, factor, wanted)
    summary *= _scale(level, BINS, NDIM)
    tl.store(out + to, summary.to(out.dtype.element_ty), wanted)


@triton.jit(do_not_specialize=SIZES)
def source_gradient(
    tables,
    d_summaries,  # gradients of the summary tokens, float32
    factors,  # of `summarise`, None: all cells are full
    d_blocks,  # gradients of the source above; None for the last source
    d_source,
    batch, heads, height, width, entries, levels, number,
    KINDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, BLOCK_P: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, BINS: tl.constexpr, NDIM: tl.constexpr,
    CELLS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The gradient of source `number` in a tile of cells: by way of the level that reads it, and of what it makes up.

    The last source is read by all levels from `number + 1` to `levels`, which are taken in one after the other.
    """
    ROWS: tl.constexpr = CELLS * PAIRS
    pid = tl.program_id(0)
    head, which, tile = pid % heads, pid // heads % KINDS, pid // (heads * KINDS)
    rows, columns = _extents(height, width, 1 << number, NDIM)
    cells_y, cells_x = _extents(height, width, BINS << number, NDIM)
    image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, ROWS)
    pair = tl.arange(0, ROWS) % PAIRS
    d = tl.arange(0, BLOCK_D)[None, :]
    k3, d3 = tl.arange(0, BLOCK_P)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    side_y = BINS if NDIM == 2 else 1
    kind_image = (which * batch + image).to(tl.int64)
    # Weights are loaded for every row, which keeps all that is summed below in one thread.
    same = tl.zeros([ROWS, 1, 1], tl.int32)
    last = number + 1
    if d_blocks is None:
        last = levels
    for level in range(number + 1, last + 1):
        shift = level - 1 - number
        table_y = _table(tables, level, which, 0, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
        table_x = _table(tables, level, which, 1, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
        start = _first_entry(level, height, width, BINS, RANK, NDIM)
        _, level_cells_x = _extents(height, width, BINS << (level - 1), NDIM)
        at = _summary_at(
            which, image[:, None, None], start, (cy >> shift)[:, None, None], (cx >> shift)[:, None, None], k3, batch,
            entries, level_cells_x, heads, head, d3, PARTS_X, PARTS_Y, HEAD_DIM,
        )  # fmt: skip
        wanted = real[:, None, None] & (k3 < RANK) & (d3 < HEAD_DIM)
        d_summary = tl.load(d_summaries + at, wanted, 0.0) * _scale(level, BINS, NDIM)
        if factors is not None:
            d_summary *= tl.load(factors + at, wanted, 0.0)
        # The tile's first unit in the level's cell, in which it may be one of several.
        first_y, first_x = (cy - (cy >> shift << shift)) * BINS, (cx - (cx >> shift << shift)) * BINS
        for begin in range(0, BINS, 2 * PAIRS):
            unit = begin + 2 * pair
            column = cx * BINS + unit
            is_even = real & (unit < BINS) & (column < columns)
            is_odd = is_even & (column + 1 < columns)
            bin3 = (first_x + unit)[:, None, None]
            even = d_summary * _weights(table_x, bin3 >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
            odd = d_summary * _weights(table_x, (bin3 + 1) >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
            for row in range(0, side_y, NDIM):
                d_block = tl.zeros([ROWS, BLOCK_D], tl.float32)
                if d_blocks is not None:
                    from_y, from_x = (cy * side_y + row) // NDIM, column // 2
                    from_rows, from_columns = _extents(height, width, 2 << number, NDIM)
                    block_at = ((kind_image * from_rows + from_y) * from_columns + from_x) * heads + head
                    there = (is_even & (from_y < from_rows))[:, None] & (d < HEAD_DIM)
                    d_block = tl.load(d_blocks + block_at[:, None] * HEAD_DIM + d, there, 0.0)
                for i in tl.static_range(NDIM):
                    y = cy * side_y + row + i
                    if NDIM == 2:
                        bin = ((first_y + row + i) >> shift)[:, None, None] + same
                        weight = _weights(table_y, bin, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
                        d_even, d_odd = d_block + tl.sum(weight * even, 1), d_block + tl.sum(weight * odd, 1)
                    else:
                        d_even, d_odd = d_block + tl.sum(even, 1), d_block + tl.sum(odd, 1)
                    to = (((kind_image * rows + y) * columns + column) * heads + head)[:, None] * HEAD_DIM + d
                    inside = (y < rows)[:, None] & (d < HEAD_DIM)
                    store_even, store_odd = is_even[:, None] & inside, is_odd[:, None] & inside
                    if d_blocks is None:
                        more = level > number + 1
                        d_even += tl.load(d_source + to, store_even & more, 0.0)
                        d_odd += tl.load(d_source + to + heads * HEAD_DIM, store_odd & more, 0.0)
                    tl.store(d_source + to, d_even, store_even)
                    tl.store(d_source + to + heads * HEAD_DIM, d_odd, store_odd)
        if d_blocks is None:
            tl.debug_barrier()  # what one thread wrote, another may read


@triton.jit
def _runs(level, batch, height, width, most, BINS: tl.constexpr, CELLS: tl.constexpr, NDIM: tl.constexpr):
    """Into how many runs a level's cells are cut, `most` or fewer, and how many tiles each has."""
    cells_y, cells_x = _extents(height, width, BINS << (level - 1), NDIM)
    tiles = tl.cdiv(batch * cells_y * cells_x, CELLS)
    run = tl.cdiv(tiles, most)
    return tl.cdiv(tiles, run), run


@triton.jit(do_not_specialize=SIZES)
def product_gradient(
    x0, x1, x2,  # as in `summarise`
    tables, summaries, factors, d_summaries,  # factors None: all cells are full
    partial,  # [slots, kinds, BINS (1D: 1), BINS, RANK, heads, channels], a slot a run, the coarsest level's first
    strides0, strides1, strides2,
    batch, heads, height, width, entries, levels, most,
    KINDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, BLOCK_P: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, BINS: tl.constexpr, NDIM: tl.constexpr, SOURCES: tl.constexpr,
    FIRST: tl.constexpr, CELLS: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Gradient of the products of weights, `W[y, x, k] = w_y[y, k] * w_x[x, k]`, over a run of cells of a level.

    A program has one row of bins of each tile, `[cells, columns, ranks, channels]`. A summary is `whole / left *
    sum(W x)`, where both sums of `|W|` have a gradient too; `whole / left` is in `factors`.
    """
    STARTS: tl.constexpr = (BINS + BLOCK_X - 1) // BLOCK_X
    SIDE_Y: tl.constexpr = BINS if NDIM == 2 else 1
    pid = tl.program_id(0)
    head, which, part = pid % heads, pid // heads % KINDS, pid // (heads * KINDS)
    row, begin, slot = part % SIDE_Y, part // SIDE_Y % STARTS * BLOCK_X, part // (SIDE_Y * STARTS)
    if FIRST:
        level = 1
        number_of_run = slot
        _, run = _runs(1, batch, height, width, most, BINS, CELLS, NDIM)
        for above in range(2, levels + 1):
            runs, _ = _runs(above, batch, height, width, most, BINS, CELLS, NDIM)
            slot += runs
        rows, columns = height, width
        x, strides = x0, strides0
        if which == 1:
            x, strides = x1, strides1
        if KINDS == 3:
            if which == 2:
                x, strides = x2, strides2
        shift = 0
        stride_b, stride_h, stride_y, stride_x = strides[0], strides[1], strides[2], strides[3]
    else:
        level, number_of_run = levels, slot
        runs, run = _runs(level, batch, height, width, most, BINS, CELLS, NDIM)
        while number_of_run >= runs:
            number_of_run -= runs
            level -= 1
            runs, run = _runs(level, batch, height, width, most, BINS, CELLS, NDIM)
        number = tl.minimum(level - 1, SOURCES)
        x = x0
        if SOURCES == 2:
            if number == 2:
                x = x1
        rows, columns = _extents(height, width, 1 << number, NDIM)
        shift = level - 1 - number
        stride_h, stride_x, stride_y = HEAD_DIM, heads * HEAD_DIM, columns * heads * HEAD_DIM
        stride_b = rows * stride_y
        x += (which * batch).to(tl.int64) * stride_b
    tokens = 1 << (level - 1)
    cells_y, cells_x = _extents(height, width, BINS * tokens, NDIM)
    start = _first_entry(level, height, width, BINS, RANK, NDIM)
    bin = begin + tl.arange(0, BLOCK_X)[None, :, None, None]
    k, d = tl.arange(0, BLOCK_P)[None, None, :, None], tl.arange(0, BLOCK_D)[None, None, None, :]
    x += head * stride_h + d
    table_y = _table(tables, level, which, 0, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
    table_x = _table(tables, level, which, 1, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)

    total = tl.zeros([CELLS, BLOCK_X, BLOCK_P, BLOCK_D], tl.float32)
    if factors is not None:
        lost = total
        whole = tl.zeros([1, 1, BLOCK_P, BLOCK_D], tl.float32)
        for i in range(BINS):
            whole += tl.abs(_weights(table_x, i, k, heads, head, d, BINS, RANK, HEAD_DIM)) * tokens
        if NDIM == 2:
            whole_y = tl.zeros([1, 1, BLOCK_P, BLOCK_D], tl.float32)
            for i in range(BINS):
                whole_y += tl.abs(_weights(table_y, i, k, heads, head, d, BINS, RANK, HEAD_DIM)) * tokens
            whole *= whole_y
    for tile in range(number_of_run * run, (number_of_run + 1) * run):
        image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, CELLS)
        image, cy, cx = image[:, None, None, None], cy[:, None, None, None], cx[:, None, None, None]
        real = real[:, None, None, None]
        y, column = (cy * SIDE_Y + row) << shift, (cx * BINS + bin) << shift
        at = x + image.to(tl.int64) * stride_b + y.to(tl.int64) * stride_y + column * stride_x
        there = real & (bin < BINS) & (d < HEAD_DIM)
        if FIRST:
            sums = tl.load(at, there & (column < columns) & (y < rows), 0.0).to(tl.float32)
        else:
            sums = tl.zeros([CELLS, BLOCK_X, 1, BLOCK_D], tl.float32)
            for unit in range(1 << (shift * NDIM)):
                down, right = unit >> shift, unit & ((1 << shift) - 1)
                inside = there & (column + right < columns) & (y + down < rows)
                sums += tl.load(at + down * stride_y + right * stride_x, inside, 0.0)
        at = _summary_at(
            which, image, start, cy, cx, k, batch, entries, cells_x, heads, head, d, PARTS_X, PARTS_Y, HEAD_DIM
        )
        wanted = real & (k < RANK) & (d < HEAD_DIM)
        d_summary = tl.load(d_summaries + at, wanted, 0.0)
        if factors is None:
            total += sums * d_summary
        else:
            factor = tl.load(factors + at, wanted, 0.0)
            total += sums * (d_summary * factor)
            exist = _tokens((cx * BINS + bin) * tokens, tokens, width)
            full = tokens * 1.0
            if NDIM == 2:
                exist *= _tokens((cy * SIDE_Y + row) * tokens, tokens, height)
                full *= full
            summary = tl.load(summaries + at, wanted, 0.0).to(tl.float32)
            lost += _ratio(d_summary * summary, whole) * (full - factor * exist)
    total *= _scale(level, BINS, NDIM)
    if factors is not None:
        weight = _weights(table_x, bin, k, heads, head, d, BINS, RANK, HEAD_DIM)
        if NDIM == 2:
            weight *= _weights(table_y, row, k, heads, head, d, BINS, RANK, HEAD_DIM)
        total += tl.where(weight > 0, lost, tl.where(weight < 0, -lost, 0.0))
    to = (((slot * KINDS + which) * SIDE_Y + row).to(tl.int64) * BINS + bin) * RANK + k
    total = tl.sum(total, 0)[None]
    tl.store(partial + (to * heads + head) * HEAD_DIM + d, total, (bin < BINS) & (k < RANK) & (d < HEAD_DIM))


@triton.jit(do_not_specialize=SIZES)
def kernel_gradient(
    tables, partial,  # of `product_gradient`
    d_kernels,  # float32 [learned, kinds, axes, RANK, heads, channels, BINS]
    batch, heads, height, width, levels, most, learned,
    KINDS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, BINS: tl.constexpr,
    BLOCK_B: tl.constexpr, NDIM: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """The gradient of one bin of a kernel, all channels: runs are added in order; 0 for a level not used."""
    pid = tl.program_id(0)
    head, k, bin = pid % heads, pid // heads % RANK, pid // (heads * RANK) % BINS
    axis, rest = pid // (heads * RANK * BINS) % NDIM, pid // (heads * RANK * BINS * NDIM)
    which, index = rest % KINDS, rest // KINDS
    d = tl.arange(0, BLOCK_D)[None, :]
    other = tl.arange(0, BLOCK_B if NDIM == 2 else 1)[:, None]
    there = (other < BINS) & (d < HEAD_DIM)
    row, column, SIDE_Y = other * 0, bin, 1
    if NDIM == 2:
        row, column, SIDE_Y = tl.where(axis == 0, bin, other), tl.where(axis == 0, other, bin), BINS
    # Levels beyond the last learned one use that one's kernels.
    first, last = index + 1, tl.minimum(index + 1, levels)
    if index == learned - 1:
        last = levels
    slot = 0
    for above in range(last + 1, levels + 1):
        runs, _ = _runs(above, batch, height, width, most, BINS, CELLS, NDIM)
        slot += runs
    slots = 0
    for level in range(first, last + 1):
        runs, _ = _runs(level, batch, height, width, most, BINS, CELLS, NDIM)
        slots += runs
    total = tl.zeros([BLOCK_B if NDIM == 2 else 1, BLOCK_D], tl.float32)
    for i in range(slot, slot + slots):
        at = (((i * KINDS + which) * SIDE_Y + row).to(tl.int64) * BINS + column) * RANK + k
        total += tl.load(partial + (at * heads + head) * HEAD_DIM + d, there, 0.0)
    if NDIM == 2:
        if slots > 0:
            at = (((index * KINDS + which) * 2 + 1 - axis) * BINS + other) * RANK + k
            total *= tl.load(tables + (at * heads + head) * HEAD_DIM + d, there, 0.0)
    result = tl.sum(total, 0)[None, :]
    at = ((((index * KINDS + which) * NDIM + axis) * RANK + k) * heads + head) * HEAD_DIM + d
    tl.store(d_kernels + at * BINS + bin, result, d < HEAD_DIM)
