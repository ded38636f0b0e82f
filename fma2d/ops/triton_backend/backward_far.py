"""The far field's backward kernels: gradients of the summary tokens, one writer each.

Linear variant: what the tokens of a sub-cell ask of a summary query is collected (`collect`), then the summary queries'
softmax is differentiated (`coarse_dq`, `coarse_dkdv`), all levels in one launch. Log-linear variant: the summary keys
of a parent are attended to by the tokens of the parents around it, at the top by all tokens; so these are cut into
pieces with partial sums (`column_dkdv`), which are added up in order (`column_sum`).
"""

import triton
import triton.language as tl

from .backward import key_step, query_step
from .indexing import (
    NOBODY,
    SIZES,
    are_apart,
    by_cell,
    coarse_cells,
    lattice_extents,
    lattice_tile,
    load_asking,
    load_rows,
    load_summaries,
    locate_cell,
    log_counts,
    signed,
    split_program,
    step_on,
    store_rows,
    window,
)

# So many sub-cells are taken in one after the other.
MOST_IN_TURN = tl.constexpr(4)


@triton.jit(do_not_specialize=SIZES)
def collect(
    state_lse, d_state, state_delta,  # of `prepare`, level 1
    far_lse,  # of `coarse_forward`, a lattice of numbers
    do, delta,  # lattices, of all levels
    height, width, heads, entries, cells, cell_size,  # cells: programs for all levels
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr,
):  # fmt: skip
    """The gradients of summary queries' values, and their deltas: sums over the level-1 sub-cells that each holds.

    On levels where few of those are held, a tile's rows are `BLOCK` entries, which take in one after the other; else
    a program has one entry and its rows are `BLOCK` of what that holds.
    """
    _, group, batch, head = split_program(cells, heads, 1)
    last_y, last_x = lattice_extents(1, height, width, cell_size, PARTS_Y, PARTS_X)
    level, start, extent_y, extent_x, side, count, alone = 1, 0, last_y, last_x, 1, 1, False
    groups = tl.cdiv(extent_y * extent_x, BLOCK)
    while group >= groups:
        group -= groups
        start += extent_y * extent_x
        level += 1
        extent_y, extent_x = lattice_extents(level, height, width, cell_size, PARTS_Y, PARTS_X)
        side, count = side * 2, count * (4 if NDIM == 2 else 2)
        alone = count > MOST_IN_TURN
        groups = tl.where(alone, extent_y * extent_x, tl.cdiv(extent_y * extent_x, BLOCK))

    index = tl.arange(0, BLOCK)
    entry = tl.where(alone, group, group * BLOCK + index)
    y, x, exists = entry // extent_x, entry % extent_x, entry < extent_y * extent_x
    row = (batch * entries + start + entry) * heads + head
    score = tl.load(far_lse + row, mask=exists, other=float("-inf"))
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    delta_sums = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.where(alone, tl.cdiv(count, BLOCK), count)):
        number = tl.where(alone, step * BLOCK + index, step)
        below_y, below_x = y, x * side + number
        if NDIM == 2:
            below_y, below_x = y * side + number // side, x * side + number % side
        there = exists & (number < count) & (below_y < last_y) & (below_x < last_x)
        below = (batch * (last_y * last_x) + below_y * last_x + below_x) * heads + head
        weight = tl.exp2(score - tl.load(state_lse + below, mask=there, other=float("inf")))
        sums += weight[:, None] * load_rows(d_state, below * HEAD_DIM, there, HEAD_DIM, BLOCK_D)
        delta_sums += weight * tl.load(state_delta + below, mask=there, other=0.0)
    if alone:
        sums = tl.sum(sums, 0)[None, :] + tl.zeros([BLOCK, BLOCK_D], tl.float32)
        delta_sums = tl.sum(delta_sums, 0) + tl.zeros([BLOCK], tl.float32)
        exists = exists & (index == 0)
    store_rows(do, row * HEAD_DIM, exists, sums, HEAD_DIM, BLOCK_D)
    tl.store(delta + row, delta_sums, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def coarse_dq(
    q, k, v, bias,  # as in `coarse_forward`
    do, lse, delta,  # lattices
    dq,
    factor, scale, height, width, heads, cells, entries, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
    COUNT_BIAS: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one parent's summary queries."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK - 1) // BLOCK
    chunk, cell, batch, head = split_program(cells, heads, CHUNKS)
    level, start, extent_y, extent_x, cell_y, cell_x = locate_cell(
        cell, height, width, cell_size, CELL_Y, CELL_X, PARTS_Y, PARTS_X
    )  # fmt: skip
    cells_y, cells_x = tl.cdiv(extent_y, CELL_Y), tl.cdiv(extent_x, CELL_X)
    y, x, exists = lattice_tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
    row = (batch * entries + start + y * extent_x + x) * heads + head
    queries = signed(load_rows(q, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D), SIGN)
    d_rows = load_rows(do, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
    own_lse, own_delta = coarse_lse(lse, row, exists), tl.load(delta + row, mask=exists, other=0.0)

    d_queries = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_y, first_x, rows, columns = window(cell_y, cell_x, cells_y, cells_x, True, True)
    chunk_k, cell_ky, cell_kx = 0, first_y, first_x
    for _ in range(rows * columns * CHUNKS):
        keys, values, addend = load_summaries(
            k, v, bias, y, x, chunk_k, level, start, batch, head, cell_ky, cell_kx, extent_y, extent_x, height, width,
            heads, entries, cell_size, HEAD_DIM, BLOCK_D, BLOCK, CELL_Y, CELL_X, PARTS_Y, PARTS_X, COUNT_BIAS,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor + addend
        d_queries = query_step(scores, keys, values, d_rows, own_lse, own_delta, d_queries, PRECISION)
        chunk_k, cell_ky, cell_kx = step_on(chunk_k, cell_ky, cell_kx, first_x, columns, CHUNKS)
    store_rows(dq, row * HEAD_DIM, exists, d_queries * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def coarse_lse(lse, row, exists):
    """Of summary queries; one that attends to nothing has -inf there, and counts as `NOBODY`."""
    score = tl.load(lse + row, mask=exists, other=float("-inf"))
    return tl.where(score > float("-inf"), score, NOBODY)


@triton.jit(do_not_specialize=SIZES)
def coarse_dkdv(
    q, k, v, bias, do, lse, delta,  # as in `coarse_dq`
    dk, dv,
    factor, scale, height, width, heads, cells, entries, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
    COUNT_BIAS: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one parent's summary keys and values: rows are keys here."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK - 1) // BLOCK
    chunk, cell, batch, head = split_program(cells, heads, CHUNKS)
    level, start, extent_y, extent_x, cell_y, cell_x = locate_cell(
        cell, height, width, cell_size, CELL_Y, CELL_X, PARTS_Y, PARTS_X
    )  # fmt: skip
    cells_y, cells_x = tl.cdiv(extent_y, CELL_Y), tl.cdiv(extent_x, CELL_X)
    y, x, exists = lattice_tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
    entry = batch * entries + start + y * extent_x + x
    row = entry * heads + head
    keys = signed(load_rows(k, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D), SIGN)
    values = load_rows(v, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
    addend = log_counts(
        bias, entry, y, x, exists, level, height, width, cell_size, PARTS_Y, PARTS_X, COUNT_BIAS
    )[:, None]  # fmt: skip

    d_keys = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_y, first_x, rows, columns = window(cell_y, cell_x, cells_y, cells_x, True, True)
    chunk_q, cell_qy, cell_qx = 0, first_y, first_x
    for _ in range(rows * columns * CHUNKS):
        qy, qx, asking = lattice_tile(chunk_q, cell_qy, cell_qx, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
        row_q = (batch * entries + start + qy * extent_x + qx) * heads + head
        queries = load_rows(q, row_q * HEAD_DIM, asking, HEAD_DIM, BLOCK_D)
        d_rows = load_rows(do, row_q * HEAD_DIM, asking, HEAD_DIM, BLOCK_D)
        their_lse, their_delta = coarse_lse(lse, row_q, asking), tl.load(delta + row_q, mask=asking, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * factor + addend
        apart = are_apart(y[:, None], x[:, None], qy[None, :], qx[None, :], PARTS_Y, PARTS_X)
        scores = tl.where(apart, scores, float("-inf"))
        d_keys, d_values = key_step(
            scores, queries, values, d_rows, their_lse, their_delta, d_keys, d_values, PRECISION
        )  # fmt: skip
        chunk_q, cell_qy, cell_qx = step_on(chunk_q, cell_qy, cell_qx, first_x, columns, CHUNKS)
    store_rows(dk, row * HEAD_DIM, exists, d_keys * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv, row * HEAD_DIM, exists, d_values, HEAD_DIM, BLOCK_D)


@triton.jit
def pieces_of(level, NDIM: tl.constexpr, MOST: tl.constexpr):
    """Into how many pieces the queries of a parent are cut: about as many tokens each at every level, up to `MOST`."""
    return tl.minimum(1 << tl.minimum(NDIM * (level - 1), 16), MOST)


@triton.jit(do_not_specialize=SIZES)
def column_dkdv(
    q, mask, k, v, bias,  # q: tokens; k, v: lattices
    do, lse, delta,  # tokens; by cell
    partial_k, partial_v,  # float32 [B, heads, slots, positions, channels], a slot for each piece
    q_strides, factor, height, width, heads, entries, slots,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAD_K: tl.constexpr,
    BLOCK_M: tl.constexpr, PAD: tl.constexpr, MOST: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr,  # of a base cell
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr,
    CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr, EVEN: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over one piece of the queries of one parent's summary keys and values: rows are keys."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (SIDE_Y * SIDE_X + BLOCK_M - 1) // BLOCK_M
    chunk, slot, batch, head = split_program(slots, heads, CHUNKS)
    level, start, piece = 1, 0, slot
    extent_y, extent_x = lattice_extents(1, height, width, SIDE_X, PARTS_Y, PARTS_X)
    pieces = pieces_of(1, NDIM, MOST)
    while piece >= pieces * coarse_cells(extent_y, extent_x, CELL_Y, CELL_X):
        piece -= pieces * coarse_cells(extent_y, extent_x, CELL_Y, CELL_X)
        start += extent_y * extent_x
        level += 1
        extent_y, extent_x = lattice_extents(level, height, width, SIDE_X, PARTS_Y, PARTS_X)
        pieces = pieces_of(level, NDIM, MOST)
    cells_x = tl.cdiv(extent_x, CELL_X)
    cell_y, cell_x = piece // pieces // cells_x, piece // pieces % cells_x
    piece = piece % pieces

    y, x, exists = lattice_tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK_N)
    entry = batch * entries + start + y * extent_x + x
    offsets = (entry * heads + head) * HEAD_DIM
    keys = signed(load_rows(k, offsets, exists, HEAD_DIM, BLOCK_D), SIGN)
    values = load_rows(v, offsets, exists, HEAD_DIM, BLOCK_D)
    addend = log_counts(bias, entry, y, x, exists, level, height, width, SIDE_X, PARTS_Y, PARTS_X, COUNT_BIAS)

    # The base cells of the parents around; a parent of level l has 2**l of them a side.
    base_y, base_x = tl.cdiv(height, SIDE_Y), tl.cdiv(width, SIDE_X)
    first_y, first_x, rows, columns = window(
        cell_y, cell_x, tl.cdiv(extent_y, CELL_Y), cells_x, not CAUSAL, True
    )  # fmt: skip
    rows = tl.minimum((first_y + rows) << level, base_y) - (first_y << level)
    columns = tl.minimum((first_x + columns) << level, base_x) - (first_x << level)
    share = tl.cdiv(rows * columns, pieces)
    d_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_y, first_x = first_y << level, first_x << level
    chunk_q, cell_qy, cell_qx = 0, first_y + piece * share // columns, first_x + piece * share % columns
    for _ in range(piece * share * STEPS, tl.minimum((piece + 1) * share, rows * columns) * STEPS):
        queries, d_rows, their_lse, their_delta, _ = load_asking(
            q, q_strides, mask, do, lse, delta, batch, head, chunk_q, cell_qy, cell_qx, height, width, heads,
            HEAD_DIM, BLOCK_D, BLOCK_M, PAD, SIDE_Y, SIDE_X, EVEN,
        )  # fmt: skip
        own_y, own_x = cell_qy >> (level - 1), cell_qx >> (level - 1)
        seen = are_apart(y, x, own_y * PARTS_Y, own_x * PARTS_X, PARTS_Y, PARTS_X)
        if CAUSAL:
            seen = seen & (x // PARTS_X < own_x)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * factor + addend[:, None]
        scores = tl.where(seen[:, None], scores, float("-inf"))
        d_keys, d_values = key_step(
            scores, queries, values, d_rows, their_lse, their_delta, d_keys, d_values, PRECISION
        )  # fmt: skip
        chunk_q, cell_qy, cell_qx = step_on(chunk_q, cell_qy, cell_qx, first_x, columns, STEPS)

    offsets = by_cell(batch, head, slot, chunk, heads, slots, PAD_K, BLOCK_N) * HEAD_DIM
    store_rows(partial_k, offsets, exists, d_keys, HEAD_DIM, BLOCK_D)
    store_rows(partial_v, offsets, exists, d_values, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def column_sum(
    partial_k, partial_v,  # of `column_dkdv`
    dk, dv,  # lattices
    scale, height, width, heads, cells, entries, slots, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PAD_K: tl.constexpr, MOST: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr,
):  # fmt: skip
    """The gradients of one parent's summary keys and values: its pieces, in order."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK - 1) // BLOCK
    chunk, cell, batch, head = split_program(cells, heads, CHUNKS)
    level, start, extent_y, extent_x, cell_y, cell_x = locate_cell(
        cell, height, width, cell_size, CELL_Y, CELL_X, PARTS_Y, PARTS_X
    )  # fmt: skip
    y, x, exists = lattice_tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
    pieces = pieces_of(level, NDIM, MOST)
    slot = (cell_y * tl.cdiv(extent_x, CELL_X) + cell_x) * pieces
    for lower in range(1, level):
        lower_y, lower_x = lattice_extents(lower, height, width, cell_size, PARTS_Y, PARTS_X)
        slot += coarse_cells(lower_y, lower_x, CELL_Y, CELL_X) * pieces_of(lower, NDIM, MOST)

    d_keys = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for piece in range(pieces):
        offsets = by_cell(batch, head, slot + piece, chunk, heads, slots, PAD_K, BLOCK) * HEAD_DIM
        d_keys += load_rows(partial_k, offsets, exists, HEAD_DIM, BLOCK_D)
        d_values += load_rows(partial_v, offsets, exists, HEAD_DIM, BLOCK_D)
    row = (batch * entries + start + y * extent_x + x) * heads + head
    store_rows(dk, row * HEAD_DIM, exists, d_keys * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv, row * HEAD_DIM, exists, d_values, HEAD_DIM, BLOCK_D)
