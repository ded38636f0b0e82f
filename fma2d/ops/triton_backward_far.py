"""The far field's backward kernels: gradients of the summary tokens, one writer each.

Linear variant: what the tokens of a sub-cell ask of a summary query is collected (`collect`), then the summary queries'
softmax is differentiated (`coarse_dq`, `coarse_dkdv`), all levels in one launch. Log-linear variant: the summary keys
of a parent are attended to by the tokens of the parents around it, at the top by all tokens; so these are cut into
pieces with partial sums (`column_dkdv`), which are added up in order (`column_sum`).
"""

import triton
import triton.language as tl

from .triton_backward import key_step, query_step
from .triton_geometry import (
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
    split_program,
    store_rows,
    walk,
    window,
)


@triton.jit(do_not_specialize=SIZES)
def collect(
    state_lse, d_state, state_delta,  # of `prepare`, level 1
    far_lse,  # of `coarse_forward`, a lattice of numbers
    d_out, delta,  # lattices, of all levels
    height, width, heads, entries, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr,
):  # fmt: skip
    """The gradient of one summary query's value, and its delta: sums over the level-1 sub-cells that it holds."""
    _, entry, batch, head = split_program(entries, heads, 1)
    last_y, last_x = lattice_extents(1, height, width, cell_size, PARTS_Y, PARTS_X)
    # Every entry is a cell of its own here.
    level, _, _, _, y, x = locate_cell(entry, height, width, cell_size, 1, 1, PARTS_Y, PARTS_X)
    row = (batch * entries + entry) * heads + head
    score = tl.load(far_lse + row)

    side = 1 << (level - 1)
    count = side
    if NDIM == 2:
        count = side * side
    sums = tl.zeros([BLOCK_D], tl.float32)
    delta_sum = 0.0
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        below_y, below_x = y * side + number // side, x * side + number % side
        exists = (number < count) & (below_y < last_y) & (below_x < last_x)
        below = (batch * (last_y * last_x) + below_y * last_x + below_x) * heads + head
        weight = tl.exp2(score - tl.load(state_lse + below, mask=exists, other=float("inf")))
        sums += tl.sum(weight[:, None] * load_rows(d_state, below * HEAD_DIM, exists, HEAD_DIM, BLOCK_D), 0)
        delta_sum += tl.sum(weight * tl.load(state_delta + below, mask=exists, other=0.0))
    channel = tl.arange(0, BLOCK_D)
    tl.store(d_out + row * HEAD_DIM + channel, sums, mask=channel < HEAD_DIM)
    tl.store(delta + row, delta_sum)


@triton.jit(do_not_specialize=SIZES)
def coarse_dq(
    q, k, v, bias,  # as in `coarse_forward`
    d_out, lse, delta,  # lattices
    d_q,
    factor, sign, scale, height, width, heads, cells, entries, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
    COUNT_BIAS: tl.constexpr, PRECISION: tl.constexpr,
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
    queries = load_rows(q, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D) * sign
    d_rows = load_rows(d_out, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
    own_lse, own_delta = coarse_lse(lse, row, exists), tl.load(delta + row, mask=exists, other=0.0)

    d_queries = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_y, first_x, rows, columns = window(cell_y, cell_x, cells_y, cells_x, True, True)
    for step in range(rows * columns * CHUNKS):
        chunk_k, cell_ky, cell_kx = walk(step, first_y, first_x, columns, CHUNKS)
        keys, values, addend = load_summaries(
            k, v, bias, y, x, chunk_k, level, start, batch, head, cell_ky, cell_kx, extent_y, extent_x, height, width,
            heads, entries, cell_size, HEAD_DIM, BLOCK_D, BLOCK, CELL_Y, CELL_X, PARTS_Y, PARTS_X, COUNT_BIAS,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor + addend
        d_queries = query_step(scores, keys, values, d_rows, own_lse, own_delta, d_queries, PRECISION)
    store_rows(d_q, row * HEAD_DIM, exists, d_queries * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def coarse_lse(lse, row, exists):
    """Of summary queries; one that attends to nothing has -inf there, and counts as `NOBODY`."""
    score = tl.load(lse + row, mask=exists, other=float("-inf"))
    return tl.where(score > float("-inf"), score, NOBODY)


@triton.jit(do_not_specialize=SIZES)
def coarse_dkdv(
    q, k, v, bias, d_out, lse, delta,  # as in `coarse_dq`
    d_k, d_v,
    factor, sign, scale, height, width, heads, cells, entries, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
    COUNT_BIAS: tl.constexpr, PRECISION: tl.constexpr,
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
    keys = load_rows(k, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D) * sign
    values = load_rows(v, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
    addend = log_counts(
        bias, entry, y, x, exists, level, height, width, cell_size, PARTS_Y, PARTS_X, COUNT_BIAS
    )[:, None]  # fmt: skip

    d_keys = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_y, first_x, rows, columns = window(cell_y, cell_x, cells_y, cells_x, True, True)
    for step in range(rows * columns * CHUNKS):
        chunk_q, cell_qy, cell_qx = walk(step, first_y, first_x, columns, CHUNKS)
        qy, qx, asking = lattice_tile(chunk_q, cell_qy, cell_qx, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
        row_q = (batch * entries + start + qy * extent_x + qx) * heads + head
        queries = load_rows(q, row_q * HEAD_DIM, asking, HEAD_DIM, BLOCK_D)
        d_rows = load_rows(d_out, row_q * HEAD_DIM, asking, HEAD_DIM, BLOCK_D)
        their_lse, their_delta = coarse_lse(lse, row_q, asking), tl.load(delta + row_q, mask=asking, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * factor + addend
        apart = are_apart(y[:, None], x[:, None], qy[None, :], qx[None, :], PARTS_Y, PARTS_X)
        scores = tl.where(apart, scores, float("-inf"))
        d_keys, d_values = key_step(
            scores, queries, values, d_rows, their_lse, their_delta, d_keys, d_values, PRECISION
        )  # fmt: skip
    store_rows(d_k, row * HEAD_DIM, exists, d_keys * scale, HEAD_DIM, BLOCK_D)
    store_rows(d_v, row * HEAD_DIM, exists, d_values, HEAD_DIM, BLOCK_D)


@triton.jit
def pieces_of(level, NDIM: tl.constexpr, MOST: tl.constexpr):
    """Into how many pieces the queries of a parent are cut: about as many tokens each at every level, up to `MOST`."""
    return tl.minimum(1 << tl.minimum(NDIM * (level - 1), 16), MOST)


@triton.jit(do_not_specialize=SIZES)
def column_dkdv(
    q, q_strides, mask, k, v, bias,  # q: tokens; k, v: lattices
    d_out, lse, delta,  # tokens; by cell
    partial_k, partial_v,  # float32 [B, heads, slots, positions, channels], a slot for each piece
    factor, sign, height, width, heads, entries, slots,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PAD_K: tl.constexpr,
    STEP: tl.constexpr, PAD: tl.constexpr, MOST: tl.constexpr,
    SIDE_Y: tl.constexpr, SIDE_X: tl.constexpr,  # of a base cell
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr,
    CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over one piece of the queries of one parent's summary keys and values: rows are keys."""
    DTYPE: tl.constexpr = q.dtype.element_ty
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK - 1) // BLOCK
    STEPS: tl.constexpr = (SIDE_Y * SIDE_X + STEP - 1) // STEP
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

    y, x, exists = lattice_tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
    entry = batch * entries + start + y * extent_x + x
    offsets = (entry * heads + head) * HEAD_DIM
    keys = (load_rows(k, offsets, exists, HEAD_DIM, BLOCK_D).to(tl.float32) * sign).to(DTYPE)
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
    d_keys = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for step in range(piece * share * STEPS, tl.minimum((piece + 1) * share, rows * columns) * STEPS):
        chunk_q, cell_qy, cell_qx = walk(step, first_y << level, first_x << level, columns, STEPS)
        queries, d_rows, their_lse, their_delta, _ = load_asking(
            q, q_strides, mask, d_out, lse, delta, batch, head, chunk_q, cell_qy, cell_qx, height, width, heads,
            HEAD_DIM, BLOCK_D, STEP, PAD, SIDE_Y, SIDE_X,
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

    offsets = by_cell(batch, head, slot, chunk, heads, slots, PAD_K, BLOCK) * HEAD_DIM
    store_rows(partial_k, offsets, exists, d_keys, HEAD_DIM, BLOCK_D)
    store_rows(partial_v, offsets, exists, d_values, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def column_sum(
    partial_k, partial_v,  # of `column_dkdv`
    d_k, d_v,  # lattices
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
    store_rows(d_k, row * HEAD_DIM, exists, d_keys * scale, HEAD_DIM, BLOCK_D)
    store_rows(d_v, row * HEAD_DIM, exists, d_values, HEAD_DIM, BLOCK_D)
