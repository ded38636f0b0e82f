"""The forward kernels: the near field, and the linear variant's far field.

A program makes one tile of queries, a cell or a run of a large cell's positions, and meets the keys of the cells around
it in an online softmax. The far field enters the near field's softmax. `FAR` says how: "state" (linear variant) as one
more column a token, merged over the levels, "columns" (log-linear variant) as the summary tokens of every level's
interaction list. With `EVEN` all cells are whole, no token is masked and tiles are whole, so that loads need no
predicates.

Scores are `factor * SIGN * q.k` in base 2 with `factor > 0`: so the largest score is that of the largest product, and
the scaling is part of the exponential's multiply-add.
"""

import triton
import triton.language as tl

from .indexing import (
    LN_2,
    LOWEST,
    SIZES,
    first_token,
    lattice_extents,
    lattice_tile,
    load_columns,
    load_near,
    load_rows,
    load_summaries,
    load_tokens,
    locate_cell,
    own_cell,
    own_entry,
    signed,
    split_program,
    step_on,
    store_rows,
    token_tile,
    window,
)


@triton.jit
def attend_to(products, factor, values, top, total, sums, PRECISION: tl.constexpr):
    """A step of the online softmax: take in columns of scores `factor * products`, -inf for none."""
    new_top = tl.maximum(top, tl.max(products, 1) * factor)
    weights = tl.exp2(products * factor - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(weights, 1)
    sums = tl.dot(weights.to(values.dtype), values, sums * fade[:, None], input_precision=PRECISION)
    return new_top, total, sums


@triton.jit
def finish(top, total, sums):
    """Out and lse of a softmax; 0 and -inf where it took in nothing."""
    some = total > 0
    total = tl.where(some, total, 1.0)
    return sums / total[:, None], tl.where(some, top + tl.log2(total), float("-inf"))


@triton.jit(do_not_specialize=SIZES)
def near_forward(
    q, k, v,
    mask,  # uint8 [B, H, W]; None: all tokens exist
    far_k, far_v,  # lattices; "state": far_v is the merged one, of level 1 alone
    far_lse,  # of far_v, for "state"
    bias,  # [B, entries]: log2 n under a mask, for "columns"
    out, lse,  # lse natural, [B, H, W, heads]
    q_strides, k_strides, v_strides, factor, height, width, heads, levels, entries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FAR_BLOCK: tl.constexpr, CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
    NDIM: tl.constexpr, FAR: tl.constexpr, CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr, EVEN: tl.constexpr,
    SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Out and lse of the tokens of one tile."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK_M - 1) // BLOCK_M
    STEPS: tl.constexpr = (CELL_Y * CELL_X + BLOCK_N - 1) // BLOCK_N  # to meet a cell
    COLUMN_TILES: tl.constexpr = ((3 if NDIM == 1 else 27) * PARTS_Y * PARTS_X + FAR_BLOCK - 1) // FAR_BLOCK
    chunk, batch, head, cell_y, cell_x, cells_y, cells_x = own_cell(height, width, heads, CELL_Y, CELL_X, CHUNKS)
    y, x, inside, exists = token_tile(mask, batch, chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK_M)
    queries = load_tokens(
        q, q_strides, batch, head, cell_y, cell_x, y, x, exists, CELL_Y, CELL_X, HEAD_DIM, BLOCK_D, EVEN
    )  # fmt: skip
    queries = signed(queries, SIGN)

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if FAR == "state":
        entry = batch * entries + own_entry(cell_y, cell_x, y, x, cells_x, CELL_Y, CELL_X, PARTS_Y, PARTS_X)
        entry = entry * heads + head
        score = tl.load(far_lse + entry) if EVEN else tl.load(far_lse + entry, mask=exists, other=float("-inf"))
        top = tl.maximum(score, LOWEST)
        total = tl.exp2(score - top)
        sums = load_rows(far_v, entry * HEAD_DIM, exists, HEAD_DIM, BLOCK_D, EVEN) * total[:, None]
    if FAR == "columns":
        start = 0
        for step in range(levels * COLUMN_TILES):
            keys, values, addend, start = load_columns(
                far_k, far_v, bias, step, start, batch, head, cell_y, cell_x, height, width, heads, entries,
                HEAD_DIM, BLOCK_D, FAR_BLOCK, COLUMN_TILES, CELL_X, PARTS_Y, PARTS_X, NDIM, CAUSAL, COUNT_BIAS,
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor + addend[None, :]
            top, total, sums = attend_to(scores, 1.0, values, top, total, sums, PRECISION)

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
        top, total, sums = attend_to(products, factor, values, top, total, sums, PRECISION)
        chunk_k, cell_ky, cell_kx = step_on(chunk_k, cell_ky, cell_kx, first_x, columns, STEPS)

    token = first_token(batch, cell_y, cell_x, height, width, CELL_Y, CELL_X)
    offsets = (y * width + x) * heads
    out += (token * heads + head) * HEAD_DIM
    lse += token * heads + head
    if EVEN:  # a token sees itself
        store_rows(out, offsets * HEAD_DIM, inside, sums * (1 / total)[:, None], HEAD_DIM, BLOCK_D, EVEN)
        tl.store(lse + offsets, (top + tl.log2(total)) * LN_2)
    else:
        result, score = finish(top, total, sums)
        some = exists & (total > 0)
        store_rows(out, offsets * HEAD_DIM, inside, tl.where(some[:, None], result, 0.0), HEAD_DIM, BLOCK_D)
        tl.store(lse + offsets, tl.where(some, score * LN_2, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def coarse_forward(
    q, k, v,  # lattices, float32
    bias,  # [B, entries]: log2 n under a mask
    out, lse,  # like q, not yet merged over the levels
    factor, height, width, heads, cells, entries, cell_size,  # cells: parents of all levels
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
    COUNT_BIAS: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Linear variant, all levels in one launch: the summary queries of one parent attend to their interaction lists."""
    CHUNKS: tl.constexpr = (CELL_Y * CELL_X + BLOCK - 1) // BLOCK
    chunk, cell, batch, head = split_program(cells, heads, CHUNKS)
    level, start, extent_y, extent_x, cell_y, cell_x = locate_cell(
        cell, height, width, cell_size, CELL_Y, CELL_X, PARTS_Y, PARTS_X
    )  # fmt: skip
    cells_y, cells_x = tl.cdiv(extent_y, CELL_Y), tl.cdiv(extent_x, CELL_X)
    y, x, exists = lattice_tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
    row = (batch * entries + start + y * extent_x + x) * heads + head
    queries = signed(load_rows(q, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D), SIGN)

    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    first_y, first_x, rows, columns = window(cell_y, cell_x, cells_y, cells_x, True, True)
    chunk_k, cell_ky, cell_kx = 0, first_y, first_x
    for _ in range(rows * columns * CHUNKS):
        keys, values, addend = load_summaries(
            k, v, bias, y, x, chunk_k, level, start, batch, head, cell_ky, cell_kx, extent_y, extent_x, height, width,
            heads, entries, cell_size, HEAD_DIM, BLOCK_D, BLOCK, CELL_Y, CELL_X, PARTS_Y, PARTS_X, COUNT_BIAS,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * factor + addend
        top, total, sums = attend_to(scores, 1.0, values, top, total, sums, PRECISION)
        chunk_k, cell_ky, cell_kx = step_on(chunk_k, cell_ky, cell_kx, first_x, columns, CHUNKS)

    result, score = finish(top, total, sums)
    store_rows(out, row * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
    tl.store(lse + row, score, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def merge_levels(
    far, far_lse,  # of `coarse_forward`
    out, lse,  # [B, entries of level 1, heads, channels], [B, entries of level 1, heads]
    height, width, heads, levels, entries, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
):  # fmt: skip
    """The far field of some summary queries of level 1: their own level's, their ancestors' one by one."""
    last_y, last_x = lattice_extents(1, height, width, cell_size, PARTS_Y, PARTS_X)
    _, block, batch, head = split_program(tl.cdiv(last_y * last_x, BLOCK), heads, 1)
    entry = block * BLOCK + tl.arange(0, BLOCK)
    exists = entry < last_y * last_x
    y, x = entry // last_x, entry % last_x

    top = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    start = 0
    for level in range(1, levels + 1):
        extent_y, extent_x = lattice_extents(level, height, width, cell_size, PARTS_Y, PARTS_X)
        # Sub-cells nest: two of an axis make one of the next level.
        ancestor = start + (y >> (level - 1)) * extent_x + (x >> (level - 1))
        row = (batch * entries + ancestor) * heads + head
        score = tl.load(far_lse + row, mask=exists, other=float("-inf"))
        new_top = tl.maximum(top, score)
        fade, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
        total = total * fade + weight
        sums = sums * fade[:, None] + load_rows(far, row * HEAD_DIM, exists, HEAD_DIM, BLOCK_D) * weight[:, None]
        top = new_top
        start += extent_y * extent_x

    result, score = finish(top, total, sums)
    row = (batch * (last_y * last_x) + entry) * heads + head
    store_rows(out, row * HEAD_DIM, exists, result, HEAD_DIM, BLOCK_D)
    tl.store(lse + row, score, mask=exists)
