"""The near field's backward kernels: every gradient has one writer, probabilities are recomputed from lse.

With `delta = sum(do * out) - d_lse` of a query, the gradient of a score is `p * (do.v - delta)`. `prepare` lays
lse and delta out by cell. Gradients that came by way of summary tokens (`extra`) are added on the last store.
"""

import triton
import triton.language as tl

from .indexing import (
    LOG2_E,
    NOBODY,
    SIZES,
    by_cell,
    first_token,
    load_asking,
    load_columns,
    load_near,
    load_rows,
    load_tokens,
    own_cell,
    own_entry,
    signed,
    step_on,
    store_rows,
    token_tile,
    window,
)


@triton.jit(do_not_specialize=SIZES)
def prepare(
    out, do, lse, d_lse,  # tokens; lse natural and d_lse [B, H, W, heads]; d_lse may be None: 0
    mask,
    lse_by_cell, delta_by_cell,
    state_lse, d_state, state_delta,  # SUMS: of level 1, [B, entries, heads], the second with channels
    height, width, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr, BLOCK_P: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
    SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lse and delta of one cell's tokens; with SUMS also their sums over its sub-cells, for the linear far field.

    A column of the far field that all tokens `t` of a sub-cell share, of lse `f`, gets from them the value gradient
    `sum of 2**(f - lse_t) do_t`, and likewise `delta`. Here it is made for `f = state_lse`, the least `lse_t`, so
    that every factor is at most 1; a column's own lse is never above that.
    """
    CHUNKS: tl.constexpr = PAD // BLOCK
    _, batch, head, cell_y, cell_x, cells_y, cells_x = own_cell(height, width, heads, CELL_Y, CELL_X, 1)
    token = first_token(batch, cell_y, cell_x, height, width, CELL_Y, CELL_X)
    lse += token * heads + head
    if d_lse is not None:
        d_lse += token * heads + head
    out += (token * heads + head) * HEAD_DIM
    do += (token * heads + head) * HEAD_DIM

    part = tl.arange(0, BLOCK_P)
    is_part = part < PARTS_Y * PARTS_X
    entry = (cell_y * PARTS_Y + part // PARTS_X) * (cells_x * PARTS_X) + cell_x * PARTS_X + part % PARTS_X
    least = tl.full([BLOCK_P], NOBODY, tl.float32)
    if SUMS:
        for chunk in range(CHUNKS):
            y, x, _inside, exists = token_tile(mask, batch, chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK)
            score = tl.load(lse + (y * width + x) * heads, mask=exists, other=NOBODY) * LOG2_E
            own = own_entry(cell_y, cell_x, y, x, cells_x, CELL_Y, CELL_X, PARTS_Y, PARTS_X)
            shared = is_part[:, None] & exists[None, :] & (own[None, :] == entry[:, None])
            least = tl.minimum(least, tl.min(tl.where(shared, score[None, :], NOBODY), 1))

    sums = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    delta_sums = tl.zeros([BLOCK_P], tl.float32)
    for chunk in range(CHUNKS):
        y, x, _inside, exists = token_tile(mask, batch, chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK)
        offsets = (y * width + x) * heads
        score = tl.load(lse + offsets, mask=exists, other=0.0) * LOG2_E
        score = tl.where(exists, score, NOBODY)
        rows = load_rows(out, offsets * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
        d_rows = load_rows(do, offsets * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
        delta = tl.sum(rows.to(tl.float32) * d_rows.to(tl.float32), 1)
        if d_lse is not None:
            delta -= tl.load(d_lse + offsets, mask=exists, other=0.0)
        place = by_cell(batch, head, cell_y * cells_x + cell_x, chunk, heads, cells_y * cells_x, PAD, BLOCK)
        tl.store(lse_by_cell + place, score)
        tl.store(delta_by_cell + place, delta)
        if SUMS:
            own = own_entry(cell_y, cell_x, y, x, cells_x, CELL_Y, CELL_X, PARTS_Y, PARTS_X)
            shared = is_part[:, None] & exists[None, :] & (own[None, :] == entry[:, None])
            weights = tl.exp2(tl.where(shared, least[:, None] - score[None, :], float("-inf")))
            sums = tl.dot(weights.to(d_rows.dtype), d_rows, sums, input_precision=PRECISION)
            delta_sums += tl.sum(weights * delta[None, :], 1)
    if SUMS:
        entries = cells_y * PARTS_Y * (cells_x * PARTS_X)
        row = (batch * entries + entry) * heads + head
        store_rows(d_state, row * HEAD_DIM, is_part, sums, HEAD_DIM, BLOCK_D)
        tl.store(state_lse + row, least, mask=is_part)
        tl.store(state_delta + row, delta_sums, mask=is_part)


@triton.jit
def query_step(scores, keys, values, d_rows, lse, delta, d_queries, PRECISION: tl.constexpr):
    """Take in the gradient of queries, the rows of `scores`, by way of some keys; scores are -inf for none."""
    d_weights = tl.dot(d_rows, tl.trans(values), input_precision=PRECISION)
    d_scores = tl.exp2(scores - lse[:, None]) * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(keys.dtype), keys, d_queries, input_precision=PRECISION)


@triton.jit
def key_step(scores, queries, values, d_rows, lse, delta, d_keys, d_values, PRECISION: tl.constexpr):
    """Take in the gradients of keys and values, the rows of `scores`, by way of some queries: both of them."""
    weights = tl.exp2(scores - lse[None, :])
    d_values = tl.dot(weights.to(d_rows.dtype), d_rows, d_values, input_precision=PRECISION)
    d_weights = tl.dot(values, tl.trans(d_rows), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[None, :])
    return tl.dot(d_scores.to(queries.dtype), queries, d_keys, input_precision=PRECISION), d_values


@triton.jit(do_not_specialize=SIZES)
def near_dq(
    q, k, v, mask, far_k, far_v, bias,  # as in `near_forward`
    do, lse, delta,  # tokens; by cell
    extra, dq,  # tokens; extra: float32 or None
    q_strides, k_strides, v_strides, factor, scale, height, width, heads, levels, entries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FAR_BLOCK: tl.constexpr, PAD: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr,
    FAR: tl.constexpr, CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr, EVEN: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one tile of queries, by near tokens and far columns."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (CELL_Y * CELL_X + BLOCK_N - 1) // BLOCK_N  # to meet a cell
    COLUMN_TILES: tl.constexpr = ((3 if NDIM == 1 else 27) * PARTS_Y * PARTS_X + FAR_BLOCK - 1) // FAR_BLOCK
    chunk, batch, head, cell_y, cell_x, cells_y, cells_x = own_cell(height, width, heads, CELL_Y, CELL_X, CHUNKS)
    y, x, inside, exists = token_tile(mask, batch, chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK_M)
    token = first_token(batch, cell_y, cell_x, height, width, CELL_Y, CELL_X)
    first_channel = (token * heads + head) * HEAD_DIM
    offsets = (y * width + x) * heads * HEAD_DIM
    queries = load_tokens(
        q, q_strides, batch, head, cell_y, cell_x, y, x, exists, CELL_Y, CELL_X, HEAD_DIM, BLOCK_D, EVEN
    )  # fmt: skip
    queries = signed(queries, SIGN)
    d_rows = load_rows(do + first_channel, offsets, exists, HEAD_DIM, BLOCK_D, EVEN)
    place = by_cell(batch, head, cell_y * cells_x + cell_x, chunk, heads, cells_y * cells_x, PAD, BLOCK_M)
    own_lse, own_delta = tl.load(lse + place), tl.load(delta + place)

    d_queries = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FAR == "columns":
        start = 0
        for step in range(levels * COLUMN_TILES):
            keys, values, addend, start = load_columns(
                far_k, far_v, bias, step, start, batch, head, cell_y, cell_x, height, width, heads, entries,
                HEAD_DIM, BLOCK_D, FAR_BLOCK, COLUMN_TILES, CELL_X, PARTS_Y, PARTS_X, NDIM, CAUSAL, COUNT_BIAS,
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor + addend[None, :]
            d_queries = query_step(scores, keys, values, d_rows, own_lse, own_delta, d_queries, PRECISION)

    first_y, first_x, rows, columns = window(cell_y, cell_x, cells_y, cells_x, True, not CAUSAL)
    column = cell_x * CELL_X + x
    chunk_k, cell_ky, cell_kx = 0, first_y, first_x
    for _ in range(rows * columns * STEPS):
        keys, values, seen = load_near(
            k, v, k_strides, v_strides, mask, column, batch, head, chunk_k, cell_ky, cell_kx, height, width,
            HEAD_DIM, BLOCK_D, BLOCK_N, CELL_Y, CELL_X, CAUSAL, EVEN,
        )  # fmt: skip
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        if CAUSAL or not EVEN:
            products = tl.where(seen, products, float("-inf"))
        d_queries = query_step(products * factor, keys, values, d_rows, own_lse, own_delta, d_queries, PRECISION)
        chunk_k, cell_ky, cell_kx = step_on(chunk_k, cell_ky, cell_kx, first_x, columns, STEPS)

    d_queries *= scale
    if extra is not None:
        d_queries += load_rows(extra + first_channel, offsets, exists, HEAD_DIM, BLOCK_D, EVEN)
    if not EVEN:
        d_queries = tl.where(exists[:, None], d_queries, 0.0)
    store_rows(dq + first_channel, offsets, inside, d_queries, HEAD_DIM, BLOCK_D, EVEN)


@triton.jit(do_not_specialize=SIZES)
def near_dkdv(
    q, k, v, mask, do, lse, delta,  # as in `near_dq`
    extra_k, extra_v, dk, dv,  # tokens; extra: float32 or None
    q_strides, k_strides, v_strides, factor, scale, height, width, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PAD: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of keys and values, by the queries of the cells around it: rows are keys here."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (CELL_Y * CELL_X + BLOCK_M - 1) // BLOCK_M  # to meet a cell
    chunk, batch, head, cell_y, cell_x, cells_y, cells_x = own_cell(height, width, heads, CELL_Y, CELL_X, CHUNKS)
    y, x, inside, exists = token_tile(mask, batch, chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK_N)
    keys = load_tokens(
        k, k_strides, batch, head, cell_y, cell_x, y, x, exists, CELL_Y, CELL_X, HEAD_DIM, BLOCK_D, EVEN
    )  # fmt: skip
    keys = signed(keys, SIGN)
    values = load_tokens(
        v, v_strides, batch, head, cell_y, cell_x, y, x, exists, CELL_Y, CELL_X, HEAD_DIM, BLOCK_D, EVEN
    )  # fmt: skip

    d_keys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    d_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_y, first_x, rows, columns = window(cell_y, cell_x, cells_y, cells_x, not CAUSAL, True)
    chunk_q, cell_qy, cell_qx = 0, first_y, first_x
    for _ in range(rows * columns * STEPS):
        queries, d_rows, their_lse, their_delta, column = load_asking(
            q, q_strides, mask, do, lse, delta, batch, head, chunk_q, cell_qy, cell_qx, height, width, heads,
            HEAD_DIM, BLOCK_D, BLOCK_M, PAD, CELL_Y, CELL_X, EVEN,
        )  # fmt: skip
        products = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)
        if CAUSAL:
            products = tl.where(cell_x * CELL_X + x[:, None] <= column[None, :], products, float("-inf"))
        d_keys, d_values = key_step(
            products * factor, queries, values, d_rows, their_lse, their_delta, d_keys, d_values, PRECISION
        )  # fmt: skip
        chunk_q, cell_qy, cell_qx = step_on(chunk_q, cell_qy, cell_qx, first_x, columns, STEPS)

    token = first_token(batch, cell_y, cell_x, height, width, CELL_Y, CELL_X)
    first_channel = (token * heads + head) * HEAD_DIM
    offsets = (y * width + x) * heads * HEAD_DIM
    d_keys *= scale
    if extra_k is not None:
        d_keys += load_rows(extra_k + first_channel, offsets, exists, HEAD_DIM, BLOCK_D, EVEN)
        d_values += load_rows(extra_v + first_channel, offsets, exists, HEAD_DIM, BLOCK_D, EVEN)
    if not EVEN:
        d_keys, d_values = tl.where(exists[:, None], d_keys, 0.0), tl.where(exists[:, None], d_values, 0.0)
    store_rows(dk + first_channel, offsets, inside, d_keys, HEAD_DIM, BLOCK_D, EVEN)
    store_rows(dv + first_channel, offsets, inside, d_values, HEAD_DIM, BLOCK_D, EVEN)
