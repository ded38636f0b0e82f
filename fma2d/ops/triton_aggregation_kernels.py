"""Triton kernels of the aggregation, launched once a level: tokens to summary tokens, and the two gradients.

A level reads a *source*: the tokens, or sums over blocks of `unit_y x unit_x` tokens. Its cells have `SIDE_Y x SIDE_X`
of these units. A tile is a run of cells of all images, all channels of one head of one tensor; its rows are pairs of
units side by side, loaded as an even and an odd column. Rows of units are added up under the vertical kernel first,
what remains of a cell then under the horizontal one. Weights come from tables `[tensors, side, rank, heads, head_dim]`,
the kernels laid out unit by unit. A grid of one axis is a row of cells one token high.

Sources are `[B, heads, rows, columns, head_dim]` of any strides, those but the last in units of `VEC`, so that the
compiler knows how far addresses are aligned. Summaries and block sums are contiguous `[tensors, B, *extents, heads,
head_dim]`, float32. All arithmetic is in float32.
"""

import triton
import triton.language as tl

# Arguments that change from image to image: none of them may cause a compilation.
SIZES = [
    *("stride_b", "stride_h", "stride_y", "stride_x", "batch", "heads", "height", "width", "unit_y", "unit_x"),
    *("scale", "first", "run"),
]
# A gradient is scaled by no more for an axis: the product of two is finite, and so is that with the gradient 0 of a
# summary that stands for no token.
MOST: tl.constexpr = tl.constexpr(1e18)


@triton.jit
def _choose(which, x0, x1, x2):
    """One of three pointers."""
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
def _weights(table, which, unit, k, heads, head, d, SIDE: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Weights of a unit of the cell, 0 outside; the shapes of `unit`, `k` and `d` broadcast."""
    at = (((which * SIDE + unit) * RANK + k) * heads + head) * HEAD_DIM + d
    return tl.load(table + at, (unit < SIDE) & (k < RANK) & (d < HEAD_DIM), 0.0)


@triton.jit
def _summary_at(
    image, cy, cx, k, cells_y, cells_x, heads, head, d,
    RANK: tl.constexpr, PARTS_X: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Where summary tokens `k` of cells lie in `[B, *lattice, heads, head_dim]`."""
    y = (image * cells_y + cy).to(tl.int64) * (RANK // PARTS_X) + k // PARTS_X
    return ((y * (cells_x * PARTS_X) + cx * PARTS_X + k % PARTS_X) * heads + head) * HEAD_DIM + d


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
    table, which, cell, k, heads, head, d, unit, extent, SIDE: tl.constexpr, RANK: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """What an axis scales cells by for what the grid's end cuts off: `[cells, ranks, channels]`; `cell`: `[cells]`."""
    whole = tl.zeros([1, k.shape[1], d.shape[2]], tl.float32)
    left = tl.zeros([cell.shape[0], k.shape[1], d.shape[2]], tl.float32)
    for i in range(SIDE):
        size = tl.abs(_weights(table, which, i, k, heads, head, d, SIDE, RANK, HEAD_DIM))
        whole += size * unit
        left += size * _tokens((cell * SIDE + i) * unit, unit, extent)[:, None, None]
    full = (cell + 1) * SIDE * unit <= extent
    return tl.where(full[:, None, None], 1.0, tl.minimum(_ratio(whole, left), 1e38))


@triton.jit
def _over_cells(x, CELLS: tl.constexpr, PAIRS: tl.constexpr):
    """Sum `[cells * pairs, ranks, channels]` over the pairs of each cell."""
    return tl.sum(tl.reshape(x, [CELLS, PAIRS, x.shape[1], x.shape[2]]), 1)


@triton.jit(do_not_specialize=SIZES)
def summarise_kernel(
    x0, x1, x2, stride_b: tl.int64, stride_h: tl.int64, stride_y: tl.int64, stride_x: tl.int64, stride_d,
    weights_y, weights_x, counts, out, factors, blocks,
    batch, heads, height, width, unit_y, unit_x, scale, first,
    TENSORS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PARTS_X: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, VEC: tl.constexpr,
    CELLS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Summary tokens `first` to `first + BLOCK_P` of a tile of cells, and sums over blocks of twice the size.

    Args:
        counts: under a mask, existing tokens of each unit, float32 `[B, rows, columns]`; else None.
        out: the summaries.
        factors: what each summary was scaled by for what is missing of its cell, shaped like `out`; None: not kept.
        blocks: sums over blocks of 2 x 2 units (1 x 2 where SIDE_Y is 1); None: not wanted. Needs even sides.
        scale: of the products of weights, `1 / (unit_y * unit_x)`.
    """
    ROWS: tl.constexpr = CELLS * PAIRS
    DOWN: tl.constexpr = 1 if SIDE_Y == 1 else 2  # rows of units at once
    pid = tl.program_id(0)
    head, which, tile = pid % heads, pid // heads % TENSORS, pid // (heads * TENSORS)
    rows, columns = (height + unit_y - 1) // unit_y, (width + unit_x - 1) // unit_x
    cells_y, cells_x = (rows + SIDE_Y - 1) // SIDE_Y, (columns + SIDE_X - 1) // SIDE_X
    image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, ROWS)
    pair = tl.arange(0, ROWS) % PAIRS
    d = tl.arange(0, BLOCK_D)[None, :]
    k3, d3 = first + tl.arange(0, BLOCK_P)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    x = _choose(which, x0, x1, x2)
    x += (image * stride_b + head * stride_h)[:, None] * VEC + d.to(tl.int64) * stride_d

    # Weights are loaded for every row, so that a row's ranks lie in one thread.
    same = tl.zeros([ROWS, 1, 1], tl.int32)
    summary = tl.zeros([CELLS, BLOCK_P, BLOCK_D], tl.float32)
    left, whole, exist = summary, summary, tl.zeros([ROWS], tl.float32)
    for start in range(0, SIDE_X, 2 * PAIRS):
        unit = start + 2 * pair
        column = cx * SIDE_X + unit
        is_even = real & (unit < SIDE_X) & (column < columns)
        is_odd = real & (unit + 1 < SIDE_X) & (column + 1 < columns)
        even = tl.zeros([ROWS, BLOCK_P, BLOCK_D], tl.float32)
        odd = even
        if counts is not None:
            left_even, left_odd = even, even
            whole_y = tl.zeros([ROWS, BLOCK_P, BLOCK_D], tl.float32)
        for row in range(0, SIDE_Y, DOWN):
            block = tl.zeros([ROWS, BLOCK_D], tl.float32)
            for i in tl.static_range(DOWN):
                y = cy * SIDE_Y + row + i
                inside = (row + i < SIDE_Y) & (y < rows)
                load_even, load_odd = is_even & inside, is_odd & inside
                weight = _weights(weights_y, which, row + i + same, k3, heads, head, d3, SIDE_Y, RANK, HEAD_DIM)
                if counts is not None:
                    count_at = counts + (image * rows + y).to(tl.int64) * columns + column
                    count_even, count_odd = tl.load(count_at, load_even, 0.0), tl.load(count_at + 1, load_odd, 0.0)
                    load_even, load_odd = count_even > 0, count_odd > 0
                    exist += count_even + count_odd
                    size = tl.abs(weight)
                    left_even += size * count_even[:, None, None]
                    left_odd += size * count_odd[:, None, None]
                    whole_y += size * unit_y
                at = x + (y * stride_y + column * stride_x)[:, None] * VEC
                x_even = tl.load(at, load_even[:, None] & (d < HEAD_DIM), 0.0).to(tl.float32)
                x_odd = tl.load(at + stride_x * VEC, load_odd[:, None] & (d < HEAD_DIM), 0.0).to(tl.float32)
                even += weight * x_even[:, None, :]
                odd += weight * x_odd[:, None, :]
                block += x_even + x_odd
            if blocks is not None:
                to_y, to_x = (cy * SIDE_Y + row) // DOWN, column // 2
                to_rows, to_columns = (rows + DOWN - 1) // DOWN, (columns + 1) // 2
                to = (((which * batch + image) * to_rows + to_y).to(tl.int64) * to_columns + to_x) * heads + head
                wanted = is_even & (to_y < to_rows)
                tl.store(blocks + to[:, None] * HEAD_DIM + d, block, wanted[:, None] & (d < HEAD_DIM))
        unit3 = unit[:, None, None]
        weight_even = _weights(weights_x, which, unit3, k3, heads, head, d3, SIDE_X, RANK, HEAD_DIM)
        weight_odd = _weights(weights_x, which, unit3 + 1, k3, heads, head, d3, SIDE_X, RANK, HEAD_DIM)
        summary += _over_cells(even * weight_even + odd * weight_odd, CELLS, PAIRS)
        if counts is not None:
            weight_even, weight_odd = tl.abs(weight_even), tl.abs(weight_odd)
            left += _over_cells(left_even * weight_even + left_odd * weight_odd, CELLS, PAIRS)
            whole += _over_cells(whole_y * (weight_even + weight_odd) * unit_x, CELLS, PAIRS)

    image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, CELLS)
    factor = tl.full([CELLS, BLOCK_P, BLOCK_D], 1.0, tl.float32)
    if counts is not None:
        full = (tl.sum(tl.reshape(exist, [CELLS, PAIRS]), 1) == SIDE_Y * SIDE_X * unit_y * unit_x)[:, None, None]
        # Divided first, so that a small rest of the weight makes no inf.
        summary = tl.where(full, summary, _ratio(summary, left) * whole)
        factor = tl.where(full, 1.0, tl.minimum(_ratio(whole, left), MOST))
    else:
        cut = ((cy + 1) * SIDE_Y * unit_y > height) | ((cx + 1) * SIDE_X * unit_x > width)
        if tl.max(cut.to(tl.int32)) > 0:
            factor = _axis_factor(weights_y, which, cy, k3, heads, head, d3, unit_y, height, SIDE_Y, RANK, HEAD_DIM)
            summary *= factor
            factor = tl.minimum(factor, MOST)
            axis = _axis_factor(weights_x, which, cx, k3, heads, head, d3, unit_x, width, SIDE_X, RANK, HEAD_DIM)
            summary *= axis
            factor *= tl.minimum(axis, MOST)
    image, cy, cx = image[:, None, None], cy[:, None, None], cx[:, None, None]
    to = _summary_at(image, cy, cx, k3, cells_y, cells_x, heads, head, d3, RANK, PARTS_X, HEAD_DIM)
    to += which * (batch.to(tl.int64) * cells_y * cells_x * RANK * heads * HEAD_DIM)
    wanted = real[:, None, None] & (k3 < RANK) & (d3 < HEAD_DIM)
    tl.store(out + to, summary * scale, wanted)
    if factors is not None:
        tl.store(factors + to, factor, wanted)


@triton.jit(do_not_specialize=SIZES)
def source_gradient_kernel(
    d0, d1, d2, stride_b: tl.int64, stride_h: tl.int64, stride_y: tl.int64, stride_x: tl.int64, stride_d,
    weights_y, weights_x, counts, g0, g1, g2, factors, p0, p1, p2,
    batch, heads, height, width, unit_y, unit_x, scale, first,
    TENSORS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PARTS_X: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, VEC: tl.constexpr, ADD: tl.constexpr,
    CELLS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the source from that of a level's summary tokens `first` to `first + BLOCK_P`.

    Args:
        d0, d1, d2: gradients of the source, strided like it; added to with ADD, else overwritten.
        counts: as in the forward; a unit without tokens has gradient 0.
        g0, g1, g2: gradients of the summaries, `[B, *lattice, heads, head_dim]` each.
        factors: as written by the forward; None: all cells are full.
        p0, p1, p2: None, or the gradients of the sums over blocks that were made from this source, added to its own;
            `[B, rows, columns, heads, head_dim]` each.
    """
    ROWS: tl.constexpr = CELLS * PAIRS
    DOWN: tl.constexpr = 1 if SIDE_Y == 1 else 2
    pid = tl.program_id(0)
    head, which, tile = pid % heads, pid // heads % TENSORS, pid // (heads * TENSORS)
    rows, columns = (height + unit_y - 1) // unit_y, (width + unit_x - 1) // unit_x
    cells_y, cells_x = (rows + SIDE_Y - 1) // SIDE_Y, (columns + SIDE_X - 1) // SIDE_X
    image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, ROWS)
    pair = tl.arange(0, ROWS) % PAIRS
    d = tl.arange(0, BLOCK_D)[None, :]
    k3, d3 = first + tl.arange(0, BLOCK_P)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    if p0 is not None:
        parent = _choose(which, p0, p1, p2)
    x = _choose(which, d0, d1, d2)
    x += (image * stride_b + head * stride_h)[:, None] * VEC + d.to(tl.int64) * stride_d

    image3, cy3, cx3 = image[:, None, None], cy[:, None, None], cx[:, None, None]
    summary_at = _summary_at(image3, cy3, cx3, k3, cells_y, cells_x, heads, head, d3, RANK, PARTS_X, HEAD_DIM)
    wanted = real[:, None, None] & (k3 < RANK) & (d3 < HEAD_DIM)
    d_summary = tl.load(_choose(which, g0, g1, g2) + summary_at, wanted, 0.0) * scale
    if factors is not None:
        summary_at += which * (batch.to(tl.int64) * cells_y * cells_x * RANK * heads * HEAD_DIM)
        d_summary *= tl.load(factors + summary_at, wanted, 0.0)
    # Weights are loaded for every row, which keeps all that is summed below in one thread.
    same = tl.zeros([ROWS, 1, 1], tl.int32)
    for start in range(0, SIDE_X, 2 * PAIRS):
        unit = start + 2 * pair
        column = cx * SIDE_X + unit
        is_even = real & (unit < SIDE_X) & (column < columns)
        is_odd = real & (unit + 1 < SIDE_X) & (column + 1 < columns)
        unit3 = unit[:, None, None]
        even = d_summary * _weights(weights_x, which, unit3, k3, heads, head, d3, SIDE_X, RANK, HEAD_DIM)
        odd = d_summary * _weights(weights_x, which, unit3 + 1, k3, heads, head, d3, SIDE_X, RANK, HEAD_DIM)
        for row in range(0, SIDE_Y, DOWN):
            d_block = tl.zeros([ROWS, BLOCK_D], tl.float32)
            if p0 is not None:
                from_y, from_x = (cy * SIDE_Y + row) // DOWN, column // 2
                from_rows, from_columns = (rows + DOWN - 1) // DOWN, (columns + 1) // 2
                block_at = ((image * from_rows + from_y).to(tl.int64) * from_columns + from_x) * heads + head
                there = is_even & (from_y < from_rows)
                d_block = tl.load(parent + block_at[:, None] * HEAD_DIM + d, there[:, None] & (d < HEAD_DIM), 0.0)
            for i in tl.static_range(DOWN):
                y = cy * SIDE_Y + row + i
                inside = (row + i < SIDE_Y) & (y < rows)
                store_even, store_odd = (is_even & inside)[:, None], (is_odd & inside)[:, None]
                weight = _weights(weights_y, which, row + i + same, k3, heads, head, d3, SIDE_Y, RANK, HEAD_DIM)
                d_even, d_odd = d_block + tl.sum(weight * even, 1), d_block + tl.sum(weight * odd, 1)
                if counts is not None:
                    count_at = (counts + (image * rows + y).to(tl.int64) * columns + column)[:, None]
                    d_even = tl.where(tl.load(count_at, store_even, 0.0) > 0, d_even, 0.0)
                    d_odd = tl.where(tl.load(count_at + 1, store_odd, 0.0) > 0, d_odd, 0.0)
                at_even = x + (y * stride_y + column * stride_x)[:, None] * VEC
                at_odd = at_even + stride_x * VEC
                store_even, store_odd = store_even & (d < HEAD_DIM), store_odd & (d < HEAD_DIM)
                if ADD:
                    d_even += tl.load(at_even, store_even, 0.0)
                    d_odd += tl.load(at_odd, store_odd, 0.0)
                tl.store(at_even, d_even, store_even)
                tl.store(at_odd, d_odd, store_odd)


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    x0, x1, x2, stride_b: tl.int64, stride_h: tl.int64, stride_y: tl.int64, stride_x: tl.int64, stride_d,
    weights_y, weights_x, counts, summaries, factors, g0, g1, g2, partial,
    batch, heads, height, width, unit_y, unit_x, scale, first, run,
    TENSORS: tl.constexpr, HEAD_DIM: tl.constexpr, RANK: tl.constexpr, PARTS_X: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr, VEC: tl.constexpr,
    CELLS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the products of weights, `W[y, x, k] = weights_y[y, k] * weights_x[x, k]`, over a run of cells.

    A program has one row of units of `run` tiles of cells, `[cells, columns, ranks, channels]`. A summary is
    `whole / left * sum(W x)`, where both sums of `|W|` have a gradient too; `whole / left` is in `factors`.

    Args:
        summaries, factors: as written by the forward; factors None: all cells are full.
        partial: `[runs, tensors, SIDE_Y, SIDE_X, RANK, heads, HEAD_DIM]`.
    """
    STARTS: tl.constexpr = (SIDE_X + BLOCK_X - 1) // BLOCK_X
    pid = tl.program_id(0)
    head, which, part = pid % heads, pid // heads % TENSORS, pid // (heads * TENSORS)
    row, start, number = part % SIDE_Y, part // SIDE_Y % STARTS * BLOCK_X, part // (SIDE_Y * STARTS)
    rows, columns = (height + unit_y - 1) // unit_y, (width + unit_x - 1) // unit_x
    cells_y, cells_x = (rows + SIDE_Y - 1) // SIDE_Y, (columns + SIDE_X - 1) // SIDE_X
    unit = start + tl.arange(0, BLOCK_X)[None, :, None, None]
    k = first + tl.arange(0, BLOCK_P)[None, None, :, None]
    d = tl.arange(0, BLOCK_D)[None, None, None, :]
    x = _choose(which, x0, x1, x2) + head * stride_h * VEC + d.to(tl.int64) * stride_d
    g = _choose(which, g0, g1, g2)

    total = tl.zeros([CELLS, BLOCK_X, BLOCK_P, BLOCK_D], tl.float32)
    if factors is not None:
        lost = total
        whole_y = tl.zeros([1, 1, BLOCK_P, BLOCK_D], tl.float32)
        whole_x = whole_y
        for i in range(SIDE_Y):
            whole_y += tl.abs(_weights(weights_y, which, i, k, heads, head, d, SIDE_Y, RANK, HEAD_DIM))
        for i in range(SIDE_X):
            whole_x += tl.abs(_weights(weights_x, which, i, k, heads, head, d, SIDE_X, RANK, HEAD_DIM))
        whole = whole_y * whole_x * (unit_y * unit_x)
    for tile in range(number * run, (number + 1) * run):
        image, cy, cx, real = _cells(tile, batch, cells_y, cells_x, CELLS, CELLS)
        image, cy, cx = image[:, None, None, None], cy[:, None, None, None], cx[:, None, None, None]
        real = real[:, None, None, None]
        y, column = cy * SIDE_Y + row, cx * SIDE_X + unit
        there = real & (unit < SIDE_X) & (column < columns) & (y < rows)
        if counts is not None:
            exist = tl.load(counts + (image * rows + y).to(tl.int64) * columns + column, there, 0.0)
            there = exist > 0
        at = x + (image * stride_b + y * stride_y + column * stride_x) * VEC
        tokens = tl.load(at, there & (d < HEAD_DIM), 0.0).to(tl.float32)
        at = _summary_at(image, cy, cx, k, cells_y, cells_x, heads, head, d, RANK, PARTS_X, HEAD_DIM)
        wanted = real & (k < RANK) & (d < HEAD_DIM)
        d_summary = tl.load(g + at, wanted, 0.0)
        if factors is None:
            total += tokens * d_summary
        else:
            at += which * (batch.to(tl.int64) * cells_y * cells_x * RANK * heads * HEAD_DIM)
            factor = tl.load(factors + at, wanted, 0.0)
            total += tokens * (d_summary * factor)
            if counts is None:
                exist = _tokens(y * unit_y, unit_y, height) * _tokens(column * unit_x, unit_x, width)
            lost += _ratio(d_summary * tl.load(summaries + at, wanted, 0.0), whole) * (unit_y * unit_x - factor * exist)
    total *= scale
    if factors is not None:
        weight = _weights(weights_y, which, row, k, heads, head, d, SIDE_Y, RANK, HEAD_DIM)
        weight *= _weights(weights_x, which, unit, k, heads, head, d, SIDE_X, RANK, HEAD_DIM)
        total += tl.where(weight > 0, lost, tl.where(weight < 0, -lost, 0.0))
    to = (((number * TENSORS + which) * SIDE_Y + row).to(tl.int64) * SIDE_X + unit) * RANK + k
    total = tl.sum(total, 0)[None]
    tl.store(partial + (to * heads + head) * HEAD_DIM + d, total, (unit < SIDE_X) & (k < RANK) & (d < HEAD_DIM))
