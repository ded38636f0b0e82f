"""The aggregation's kernels on the way back: gradients of the tokens, and of the kernels.

The words are those of `aggregation_kernels`. A kernel's gradient is made in two steps, as every sum has one writer:
sums over runs of cells, then over the runs in order.
"""

import triton
import triton.language as tl

from .aggregation_kernels import (
    cells_of,
    extents_of,
    first_entry,
    ratio,
    scale_of,
    summary_at,
    table_of,
    tokens_of,
    weights_of,
)
from .indexing import SIZES


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
    rows, columns = extents_of(height, width, 1 << number, NDIM)
    cells_y, cells_x = extents_of(height, width, BINS << number, NDIM)
    image, cy, cx, real = cells_of(tile, batch, cells_y, cells_x, CELLS, ROWS)
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
        table_y = table_of(tables, level, which, 0, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
        table_x = table_of(tables, level, which, 1, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
        start = first_entry(level, height, width, BINS, RANK, NDIM)
        _, level_cells_x = extents_of(height, width, BINS << (level - 1), NDIM)
        at = summary_at(
            which, image[:, None, None], start, (cy >> shift)[:, None, None], (cx >> shift)[:, None, None], k3, batch,
            entries, level_cells_x, heads, head, d3, PARTS_X, PARTS_Y, HEAD_DIM,
        )  # fmt: skip
        wanted = real[:, None, None] & (k3 < RANK) & (d3 < HEAD_DIM)
        d_summary = tl.load(d_summaries + at, wanted, 0.0) * scale_of(level, BINS, NDIM)
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
            even = d_summary * weights_of(table_x, bin3 >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
            odd = d_summary * weights_of(table_x, (bin3 + 1) >> shift, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
            for row in range(0, side_y, NDIM):
                d_block = tl.zeros([ROWS, BLOCK_D], tl.float32)
                if d_blocks is not None:
                    from_y, from_x = (cy * side_y + row) // NDIM, column // 2
                    from_rows, from_columns = extents_of(height, width, 2 << number, NDIM)
                    block_at = ((kind_image * from_rows + from_y) * from_columns + from_x) * heads + head
                    there = (is_even & (from_y < from_rows))[:, None] & (d < HEAD_DIM)
                    d_block = tl.load(d_blocks + block_at[:, None] * HEAD_DIM + d, there, 0.0)
                for i in tl.static_range(NDIM):
                    y = cy * side_y + row + i
                    if NDIM == 2:
                        bin = ((first_y + row + i) >> shift)[:, None, None] + same
                        weight = weights_of(table_y, bin, k3, heads, head, d3, BINS, RANK, HEAD_DIM)
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
    cells_y, cells_x = extents_of(height, width, BINS << (level - 1), NDIM)
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
        if KINDS == 3:  # noqa: SIM102 (of the compiler, then of the call)
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
        if SOURCES == 2:  # noqa: SIM102 (of the compiler, then of the call)
            if number == 2:
                x = x1
        rows, columns = extents_of(height, width, 1 << number, NDIM)
        shift = level - 1 - number
        stride_h, stride_x, stride_y = HEAD_DIM, heads * HEAD_DIM, columns * heads * HEAD_DIM
        stride_b = rows * stride_y
        x += (which * batch).to(tl.int64) * stride_b
    tokens = 1 << (level - 1)
    cells_y, cells_x = extents_of(height, width, BINS * tokens, NDIM)
    start = first_entry(level, height, width, BINS, RANK, NDIM)
    bin = begin + tl.arange(0, BLOCK_X)[None, :, None, None]
    k, d = tl.arange(0, BLOCK_P)[None, None, :, None], tl.arange(0, BLOCK_D)[None, None, None, :]
    x += head * stride_h + d
    table_y = table_of(tables, level, which, 0, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)
    table_x = table_of(tables, level, which, 1, heads, BINS, RANK, HEAD_DIM, KINDS, NDIM)

    total = tl.zeros([CELLS, BLOCK_X, BLOCK_P, BLOCK_D], tl.float32)
    if factors is not None:
        lost = total
        whole = tl.zeros([1, 1, BLOCK_P, BLOCK_D], tl.float32)
        for i in range(BINS):
            whole += tl.abs(weights_of(table_x, i, k, heads, head, d, BINS, RANK, HEAD_DIM)) * tokens
        if NDIM == 2:
            whole_y = tl.zeros([1, 1, BLOCK_P, BLOCK_D], tl.float32)
            for i in range(BINS):
                whole_y += tl.abs(weights_of(table_y, i, k, heads, head, d, BINS, RANK, HEAD_DIM)) * tokens
            whole *= whole_y
    for tile in range(number_of_run * run, (number_of_run + 1) * run):
        image, cy, cx, real = cells_of(tile, batch, cells_y, cells_x, CELLS, CELLS)
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
        at = summary_at(
            which, image, start, cy, cx, k, batch, entries, cells_x, heads, head, d, PARTS_X, PARTS_Y, HEAD_DIM
        )
        wanted = real & (k < RANK) & (d < HEAD_DIM)
        d_summary = tl.load(d_summaries + at, wanted, 0.0)
        if factors is None:
            total += sums * d_summary
        else:
            factor = tl.load(factors + at, wanted, 0.0)
            total += sums * (d_summary * factor)
            exist = tokens_of((cx * BINS + bin) * tokens, tokens, width)
            full = tokens * 1.0
            if NDIM == 2:
                exist *= tokens_of((cy * SIDE_Y + row) * tokens, tokens, height)
                full *= full
            summary = tl.load(summaries + at, wanted, 0.0).to(tl.float32)
            lost += ratio(d_summary * summary, whole) * (full - factor * exist)
    total *= scale_of(level, BINS, NDIM)
    if factors is not None:
        weight = weights_of(table_x, bin, k, heads, head, d, BINS, RANK, HEAD_DIM)
        if NDIM == 2:
            weight *= weights_of(table_y, row, k, heads, head, d, BINS, RANK, HEAD_DIM)
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
    if NDIM == 2:  # noqa: SIM102 (of the compiler, then of the call)
        if slots > 0:
            at = (((index * KINDS + which) * 2 + 1 - axis) * BINS + other) * RANK + k
            total *= tl.load(tables + (at * heads + head) * HEAD_DIM + d, there, 0.0)
    result = tl.sum(total, 0)[None, :]
    at = ((((index * KINDS + which) * NDIM + axis) * RANK + k) * heads + head) * HEAD_DIM + d
    tl.store(d_kernels + at * BINS + bin, result, d < HEAD_DIM)
