"""Index arithmetic and loads that the attention kernels share.

Every grid has two axes here: a 1D grid is one row, with cells of one row and one sub-cell across it. The kernels know
three layouts, in which `channels` are the `HEAD_DIM` channels of a head, contiguous:

- *tokens*: q, k and v with their own strides of (batch, head, row, column); all else `[B, H, W, heads, channels]`.
- *lattices*: the summary tokens of all levels in one array `[B, entries, heads, channels]`, level 1 first, the lattice
  of each level row-major; what is one number an entry is `[B, entries, heads]`. In the dtype of the tokens for the
  log-linear variant, else float32.
- *by cell*: one float32 for every token, `[B, heads, cells, PAD]`: a base cell's positions in row-major order, padded
  to whole tiles of the largest size.

Log-sum-exps inside are of base 2, and `NOBODY` for a query that does not exist, which gives every key the weight 0.
"""

import triton
import triton.language as tl

# Where a softmax starts: finite, so that no difference of infinities arises.
LOWEST = tl.constexpr(-1e30)
NOBODY = tl.constexpr(1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Arguments that change from call to call without being a reason to compile again.
SIZES = ("batch", "height", "width", "heads", "levels", "entries", "cells", "slots", "cell_size")


@triton.jit
def split_program(cells, heads, CHUNKS: tl.constexpr):
    """`(chunk, cell, batch, head)` of a program: the chunks of a cell follow one another, then cells, heads, batch."""
    program = tl.program_id(0)
    batch_head = (program // CHUNKS // cells).to(tl.int64)
    return program % CHUNKS, program // CHUNKS % cells, batch_head // heads, batch_head % heads


@triton.jit
def window(cell_y, cell_x, cells_y, cells_x, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """The cells around a cell that exist: `(first_y, first_x, rows, columns)`.

    BEFORE and AFTER: whether to look to the left and to the right; one of them is False if causal.
    """
    first_y, first_x = tl.maximum(cell_y - 1, 0), tl.maximum(cell_x - 1, 0)
    last_y, last_x = tl.minimum(cell_y + 1, cells_y - 1), tl.minimum(cell_x + 1, cells_x - 1)
    if not BEFORE:
        first_x = cell_x
    if not AFTER:
        last_x = cell_x
    return first_y, first_x, last_y - first_y + 1, last_x - first_x + 1


@triton.jit
def step_on(chunk, cell_y, cell_x, first_x, columns, CHUNKS: tl.constexpr):
    """The next tile of a window, `CHUNKS` a cell: `(chunk, cell_y, cell_x)`; counted, as divisions are slow."""
    if CHUNKS > 1:
        chunk += 1
        is_last = chunk == CHUNKS
        chunk = tl.where(is_last, 0, chunk)
        cell_x += tl.where(is_last, 1, 0)
    else:
        cell_x += 1
    is_beyond = cell_x == first_x + columns
    return chunk, cell_y + tl.where(is_beyond, 1, 0), tl.where(is_beyond, first_x, cell_x)


@triton.jit
def tile(chunk, cell_y, cell_x, height, width, CELL_Y: tl.constexpr, CELL_X: tl.constexpr, BLOCK: tl.constexpr):
    """A run of `BLOCK` positions of a cell: `(y, x, inside)`, offsets in the cell and whether the grid has them."""
    position = chunk * BLOCK + tl.arange(0, BLOCK)
    y, x = position // CELL_X, position % CELL_X
    inside = (y < tl.minimum(height - cell_y * CELL_Y, CELL_Y)) & (x < width - cell_x * CELL_X)
    return y, x, inside


@triton.jit
def load_rows(pointer, offsets, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr = False):
    """`[rows, BLOCK_D]`: the channels of one token a row, 0 where it does not exist; with EVEN all do."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    if EVEN and HEAD_DIM == BLOCK_D:
        return tl.load(pointer + offsets[:, None] + channel)
    mask = exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (channel < HEAD_DIM)
    return tl.load(pointer + offsets[:, None] + channel, mask=mask, other=0.0)


@triton.jit
def store_rows(
    pointer, offsets, exists, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr = False
):
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = None
    if not (EVEN and HEAD_DIM == BLOCK_D):
        mask = exists[:, None]
        if HEAD_DIM < BLOCK_D:
            mask = mask & (channel < HEAD_DIM)
    tl.store(pointer + offsets[:, None] + channel, rows.to(pointer.dtype.element_ty), mask=mask)


# Tokens. Pointers go to a cell in 64 bits; within it 32 bits are enough.


@triton.jit
def first_token(batch, cell_y, cell_x, height, width, CELL_Y: tl.constexpr, CELL_X: tl.constexpr):
    """Number in `[B, H, W]` of a cell's first token."""
    return (batch * height + cell_y * CELL_Y) * width + cell_x * CELL_X


@triton.jit
def token_tile(
    mask, batch, chunk, cell_y, cell_x, height, width,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `tile`, and whether the tokens exist: `(y, x, inside, exists)`; `mask` is uint8 `[B, H, W]` or None."""
    y, x, inside = tile(chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK)
    exists = inside
    if mask is not None:
        mask += first_token(batch, cell_y, cell_x, height, width, CELL_Y, CELL_X)
        exists = tl.load(mask + y * width + x, mask=inside, other=0) != 0
    return y, x, inside, exists


@triton.jit
def load_tokens(
    pointer, strides, batch, head, cell_y, cell_x, y, x, exists,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Tokens of q, k or v at offsets `(y, x)` of a cell, `[rows, BLOCK_D]`."""
    pointer += batch * strides[0] + head * strides[1]
    pointer += (cell_y * CELL_Y).to(tl.int64) * strides[2] + (cell_x * CELL_X).to(tl.int64) * strides[3]
    return load_rows(pointer, y * strides[2] + x * strides[3], exists, HEAD_DIM, BLOCK_D, EVEN)


@triton.jit
def own_cell(height, width, heads, CELL_Y: tl.constexpr, CELL_X: tl.constexpr, CHUNKS: tl.constexpr):
    """The base cell of a program: `(chunk, batch, head, cell_y, cell_x, cells_y, cells_x)`."""
    cells_y, cells_x = tl.cdiv(height, CELL_Y), tl.cdiv(width, CELL_X)
    chunk, cell, batch, head = split_program(cells_y * cells_x, heads, CHUNKS)
    return chunk, batch, head, cell // cells_x, cell % cells_x, cells_y, cells_x


@triton.jit
def by_cell(batch, head, cell, chunk, heads, cells, PAD: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a tile in an array by cell."""
    return ((batch * heads + head) * cells + cell) * PAD + chunk * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def load_near(
    k, v, k_strides, v_strides, mask, column, batch, head, chunk, cell_y, cell_x, height, width,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, CELL_Y: tl.constexpr, CELL_X: tl.constexpr,
    CAUSAL: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile, and which of them queries in a `column` of the grid see: `[queries | 1, BLOCK]`."""
    y, x, _, exists = token_tile(mask, batch, chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK)
    keys = load_tokens(
        k, k_strides, batch, head, cell_y, cell_x, y, x, exists, CELL_Y, CELL_X, HEAD_DIM, BLOCK_D, EVEN
    )  # fmt: skip
    values = load_tokens(
        v, v_strides, batch, head, cell_y, cell_x, y, x, exists, CELL_Y, CELL_X, HEAD_DIM, BLOCK_D, EVEN
    )  # fmt: skip
    seen = exists[None, :]
    if CAUSAL:
        seen = seen & (cell_x * CELL_X + x[None, :] <= column[:, None])
    return keys, values, seen


@triton.jit
def load_asking(
    q, q_strides, mask, do, lse, delta, batch, head, chunk, cell_y, cell_x, height, width, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr, CELL_Y: tl.constexpr,
    CELL_X: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Queries of a tile and what their gradient takes: `(queries, do, lse, delta, column)`, lse and delta by cell.

    The lse of a query that does not exist makes its weights 0.
    """
    y, x, _, exists = token_tile(mask, batch, chunk, cell_y, cell_x, height, width, CELL_Y, CELL_X, BLOCK)
    queries = load_tokens(
        q, q_strides, batch, head, cell_y, cell_x, y, x, exists, CELL_Y, CELL_X, HEAD_DIM, BLOCK_D, EVEN
    )  # fmt: skip
    token = first_token(batch, cell_y, cell_x, height, width, CELL_Y, CELL_X)
    first_channel = (token * heads + head) * HEAD_DIM
    d_rows = load_rows(do + first_channel, (y * width + x) * heads * HEAD_DIM, exists, HEAD_DIM, BLOCK_D, EVEN)
    cells_y, cells_x = tl.cdiv(height, CELL_Y), tl.cdiv(width, CELL_X)
    place = by_cell(batch, head, cell_y * cells_x + cell_x, chunk, heads, cells_y * cells_x, PAD, BLOCK)
    return queries, d_rows, tl.load(lse + place), tl.load(delta + place), cell_x * CELL_X + x


@triton.jit
def own_entry(cell_y, cell_x, y, x, cells_x, CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr,
              PARTS_X: tl.constexpr):  # fmt: skip
    """The entry of the level-1 lattice whose sub-cell holds a token: on each axis, the token's midpoint."""
    part_y, part_x = (2 * y + 1) * PARTS_Y // (2 * CELL_Y), (2 * x + 1) * PARTS_X // (2 * CELL_X)
    return (cell_y * PARTS_Y + part_y) * (cells_x * PARTS_X) + cell_x * PARTS_X + part_x


# Summary tokens.


@triton.jit
def signed(rows, SIGN: tl.constexpr):
    """Rows times the sign of the scale; nearly always it is 1, and a conversion keeps products from overlapping."""
    if SIGN == 1:
        return rows
    return (rows.to(tl.float32) * SIGN).to(rows.dtype)


@triton.jit
def lattice_extents(level, height, width, cell_size, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr):
    side = cell_size << (level - 1)
    return tl.cdiv(height, side) * PARTS_Y, tl.cdiv(width, side) * PARTS_X


@triton.jit
def coarse_cells(extent_y, extent_x, CELL_Y: tl.constexpr, CELL_X: tl.constexpr):
    return tl.cdiv(extent_y, CELL_Y) * tl.cdiv(extent_x, CELL_X)


@triton.jit
def locate_cell(
    cell, height, width, cell_size,
    CELL_Y: tl.constexpr, CELL_X: tl.constexpr, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr,
):  # fmt: skip
    """Find a parent, given its number among those of all levels.

    Returns:
        `(level, start, extent_y, extent_x, cell_y, cell_x)`: its level, the first entry and the extents of the level's
        lattice, its place among the level's parents.
    """
    level, start = 1, 0
    extent_y, extent_x = lattice_extents(1, height, width, cell_size, PARTS_Y, PARTS_X)
    while cell >= coarse_cells(extent_y, extent_x, CELL_Y, CELL_X):
        cell -= coarse_cells(extent_y, extent_x, CELL_Y, CELL_X)
        start += extent_y * extent_x
        level += 1
        extent_y, extent_x = lattice_extents(level, height, width, cell_size, PARTS_Y, PARTS_X)
    cells_x = tl.cdiv(extent_x, CELL_X)
    return level, start, extent_y, extent_x, cell // cells_x, cell % cells_x


@triton.jit
def lattice_tile(
    chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y: tl.constexpr, CELL_X: tl.constexpr, BLOCK: tl.constexpr
):
    """A run of `BLOCK` positions of a parent: `(y, x, exists)` in the level's lattice."""
    y, x, exists = tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
    return cell_y * CELL_Y + y, cell_x * CELL_X + x, exists


@triton.jit
def are_apart(y, x, other_y, other_x, PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr):
    """Whether summary tokens of a level lie in cells that are not neighbours."""
    away_y, away_x = tl.abs(y // PARTS_Y - other_y // PARTS_Y), tl.abs(x // PARTS_X - other_x // PARTS_X)
    return tl.maximum(away_y, away_x) > 1


@triton.jit
def log_counts(
    bias, entry, y, x, exists, level, height, width, cell_size,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, COUNT_BIAS: tl.constexpr,
):  # fmt: skip
    """`log2 n` of the summary tokens at `(y, x)` of a level's lattice, -inf where one does not exist or has no token.

    `bias`: the same under a mask, `[B, entries]`, read at `entry`; None if no token is masked.
    """
    if bias is None:
        side = cell_size << (level - 1)
        count = _axis_count(y, height, side, PARTS_Y) * _axis_count(x, width, side, PARTS_X)
        exists = exists & (count > 0)
        addend = tl.where(exists, 0.0, float("-inf"))
        if COUNT_BIAS:
            addend += tl.log2(tl.where(exists, count, 1.0) / (PARTS_Y * PARTS_X))
    else:
        addend = tl.load(bias + entry, mask=exists, other=float("-inf"))
    return addend


@triton.jit
def _axis_count(position, extent, side, PARTS: tl.constexpr):
    """Tokens of an axis in one of its sub-cells, in units of `1 / PARTS` tokens."""
    start = position % PARTS * side
    tokens = extent - position // PARTS * side
    return tl.maximum(tl.minimum(tokens * PARTS, start + side) - start, 0).to(tl.float32)


@triton.jit
def interaction_list(
    column, own_y, own_x, extent_y, extent_x,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The summary tokens that the tokens of one cell attend to, by number: `(y, x, exists)` in the level's lattice.

    The children of the parent's neighbours are 6 rows of 6, of which the 3 x 3 around the own cell are left out.
    Numbers run through the rows above those, then through what is beside them, then through the rows below. In 1D there
    is only the row beside.
    """
    cell, part = column // (PARTS_Y * PARTS_X), column % (PARTS_Y * PARTS_X)
    parity_y, parity_x = own_y % 2, own_x % 2
    if NDIM == 1:
        exists = cell < 3
        y, beside = own_y, cell
        x = cell + tl.where(cell > parity_x, 3, 0)
    else:
        exists = cell < 27
        beside = cell - 6 * (1 + parity_y)
        is_beside = (beside >= 0) & (beside < 9)
        elsewhere = tl.where(beside < 0, cell, cell + 9)  # the number if the rows beside had six cells, too
        y = tl.where(is_beside, 1 + parity_y + beside // 3, elsewhere // 6)
        x = tl.where(is_beside, beside % 3 + tl.where(beside % 3 > parity_x, 3, 0), elsewhere % 6)
        y += own_y // 2 * 2 - 2
    x += own_x // 2 * 2 - 2
    if CAUSAL:
        exists = exists & (x < own_x)
    y, x = y * PARTS_Y + part // PARTS_X, x * PARTS_X + part % PARTS_X
    return y, x, exists & (y >= 0) & (y < extent_y) & (x >= 0) & (x < extent_x)


@triton.jit
def load_columns(
    far_k, far_v, bias, step, start, batch, head, cell_y, cell_x, height, width, heads, entries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, CELL_SIZE: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, NDIM: tl.constexpr, CAUSAL: tl.constexpr, COUNT_BIAS: tl.constexpr,
):  # fmt: skip
    """A step of the way through a base cell's interaction lists of all levels, `TILES` steps a level.

    Returns:
        `(keys, values, addend, start)`: some summary tokens, what is added to their scores, and the first entry of the
        next step's level, given that of this one.
    """
    level, number = 1 + step // TILES, step % TILES * BLOCK + tl.arange(0, BLOCK)
    extent_y, extent_x = lattice_extents(level, height, width, CELL_SIZE, PARTS_Y, PARTS_X)
    own_y, own_x = cell_y >> (level - 1), cell_x >> (level - 1)
    y, x, exists = interaction_list(number, own_y, own_x, extent_y, extent_x, PARTS_Y, PARTS_X, NDIM, CAUSAL)
    # Pointers go to the corner of what is around the parent in 64 bits; from there 32 bits are enough.
    corner = (own_x // 2 * 2 - 2) * PARTS_X
    if NDIM == 2:
        corner += (own_y // 2 * 2 - 2) * PARTS_Y * extent_x
    first, entry = batch * entries + start + corner, y * extent_x + x - corner
    first_channel = (first * heads + head) * HEAD_DIM
    keys = load_rows(far_k + first_channel, entry * heads * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
    values = load_rows(far_v + first_channel, entry * heads * HEAD_DIM, exists, HEAD_DIM, BLOCK_D)
    if bias is not None:
        bias += first
    addend = log_counts(bias, entry, y, x, exists, level, height, width, CELL_SIZE, PARTS_Y, PARTS_X, COUNT_BIAS)
    start += tl.where(step % TILES == TILES - 1, extent_y * extent_x, 0)
    return keys, values, addend, start


@triton.jit
def load_summaries(
    k, v, bias, y, x, chunk, level, start, batch, head, cell_y, cell_x, extent_y, extent_x, height, width, heads,
    entries, cell_size,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, CELL_Y: tl.constexpr, CELL_X: tl.constexpr,
    PARTS_Y: tl.constexpr, PARTS_X: tl.constexpr, COUNT_BIAS: tl.constexpr,
):  # fmt: skip
    """Keys and values of a tile of a parent, and what is added to the scores of the summary queries at `(y, x)`.

    The addends are `[queries, BLOCK]`, -inf for what is absent or lies in a neighbour of the query's cell.
    """
    key_y, key_x, exists = lattice_tile(chunk, cell_y, cell_x, extent_y, extent_x, CELL_Y, CELL_X, BLOCK)
    entry = batch * entries + start + key_y * extent_x + key_x
    offsets = (entry * heads + head) * HEAD_DIM
    keys = load_rows(k, offsets, exists, HEAD_DIM, BLOCK_D)
    values = load_rows(v, offsets, exists, HEAD_DIM, BLOCK_D)
    addend = log_counts(
        bias, entry, key_y, key_x, exists, level, height, width, cell_size, PARTS_Y, PARTS_X, COUNT_BIAS
    )  # fmt: skip
    apart = are_apart(y[:, None], x[:, None], key_y[None, :], key_x[None, :], PARTS_Y, PARTS_X)
    return keys, values, tl.where(apart, addend[None, :], float("-inf"))
