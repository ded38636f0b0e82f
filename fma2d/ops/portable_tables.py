"""Tables of `portable.attention`: which rows are gathered, and what is added to their scores.

They are made of the extents along each axis. Where these are integers the tables are made once, outside of any tracer,
and are constants of what is exported; where they are tensors, the operations here become part of it.

An index along an axis counts cells of the padded grid, which consists of whole parents of the coarsest level. What a
parent or a cell holds is stored in the order `[cells, sub-cells]`, each row by row.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, arange
from torch.utils._python_dispatch import _disable_current_modes

from ..geometry import cell_side, tiling

# Score of what is not there. Not -inf, of which 0 times is NaN, and within the range of float16.
ABSENT = -3e4


class Grid(NamedTuple):
    """What the tables depend on; `levels` at least 1, and twice the coarsest cells' side covers the grid."""

    height: int
    width: int
    cell_size: int
    rank: int
    levels: int
    is_linear: bool
    count_bias: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def extents(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def is_fixed(self) -> bool:
        return type(self.height) is int and type(self.width) is int

    @property
    def padded(self) -> tuple[int, int]:
        """Tokens of whole parents of the coarsest level."""
        side = cell_side(self.levels + 1, self.cell_size)
        return tuple((n + side - 1) // side * side for n in self.extents)

    def tables(self) -> "Tables":
        return _constant_tables(self) if self.is_fixed else make_tables(self)


class Tables(NamedTuple):
    """Indices and biases; `N` cells, `R` summary tokens and `F` far results (`4 * rank` a parent) of all levels.

    Attributes:
        queries: `[N, r * r]`: the tokens of every cell; any where there is none.
        tokens: `[H * W]`: the place of every token among these.
        near: `[N, M]`: the rows of keys that a cell's queries attend to. Rows are the tokens, then the summary tokens
            (log-linear) or the far results of cells (linear), then one that is absent.
        bias: log-linear: `[H * W + R + 1, 1]`, of every row. Linear: `[N * levels * rank + 1, rank]`, of the far
            results of cells under the sub-cell of a query.
        far: linear: `[parents, 36 * rank]`: the summary tokens in a parent's window, its own in the middle.
        far_bias: linear: `[parents, 4 * rank, 36 * rank]`.
        results: linear: `[N * levels * rank + 1]`: which of `F` is the far result of a cell, level and sub-cell.
        own: linear: `[r * r, rank]`: 1 in the column of a token's sub-cell.
    """

    queries: Tensor
    tokens: Tensor
    near: Tensor
    bias: Tensor
    far: Tensor | None = None
    far_bias: Tensor | None = None
    results: Tensor | None = None
    own: Tensor | None = None


@lru_cache(maxsize=16)
def _constant_tables(grid: Grid) -> Tables:
    with _disable_current_modes(), torch.inference_mode(False):  # whatever the call that happens to be the first
        return make_tables(grid)


def make_tables(grid: Grid) -> Tables:
    """The tables, by operations on the extents."""
    r, tokens, device = grid.cell_size, grid.height * grid.width, grid.device
    cells = [(n + r - 1) // r for n in grid.extents]
    starts = [arange(n, device=device)[:, None] * r for n in cells]
    offset, reach = arange(r, device=device), arange(-r, 2 * r, device=device)

    own = [(start + offset).clamp(max=n - 1) for start, n in zip(starts, grid.extents, strict=True)]
    queries = _outer(own[0] * grid.width, own[1])
    rows, columns = starts[0] * (cells[1] * r) + offset * r, starts[1] * r + offset
    places = rows.reshape(-1, 1)[: grid.height] + columns.reshape(1, -1)[:, : grid.width]
    around = [start + reach for start in starts]
    inside = _outer(*((t >= 0) & (t < n) for t, n in zip(around, grid.extents, strict=True)), torch.logical_and)
    near = _outer(around[0] * grid.width, around[1])
    make = _linear if grid.is_linear else _loglinear
    far, others, rest = make(grid, cells, tokens)
    near = torch.cat((torch.where(inside, near, tokens + others), far), 1)
    return Tables(queries, places.reshape(-1), near, **rest)


def _linear(grid: Grid, cells: list[int], tokens: int) -> tuple[Tensor, int, dict]:
    """The far part of `near`, how many rows there are between the tokens and the absent one, the other tables."""
    rank, parts = grid.rank, tiling(grid.rank, 2)
    windows = [_window(grid, level) for level in range(1, grid.levels + 1)]
    close = _outer(*[_close(grid, [0, 1])] * 2, torch.logical_and)  # [4, 9, 4]
    close = close[:, None, :, :, None].expand(-1, rank, -1, -1, rank).reshape(4 * rank, -1)
    results, first = [], 0
    for level in range(1, grid.levels + 1):
        parents = _parents(grid, level)
        axes = []
        for axis, (n, p, stride) in enumerate(zip(cells, parts, (parents[1], 1), strict=True)):
            below = [[(j * p + k) >> (level - 1) for k in range(p)] for j in range(2**level)]
            # Of the parent's two cells along the axis and their sub-cells.
            below = [[i // p * (2 - axis) * rank + i % p * (1, parts[1])[1 - axis] for i in line] for line in below]
            below = torch.tensor(below, device=grid.device)
            place = arange(parents[axis], device=grid.device)[:, None, None] * (stride * 4 * rank) + below
            axes.append(place.reshape(-1, p)[:n])
        results.append(_outer(*axes) + first)
        first = first + parents[0] * parents[1] * 4 * rank
    results = torch.stack(results, 1).reshape(-1)  # cells, levels, sub-cells
    count = cells[0] * cells[1] * grid.levels * rank
    bias = (1 - torch.eye(rank, dtype=grid.dtype, device=grid.device)) * ABSENT
    side = grid.cell_size
    rows, columns = (
        torch.tensor([(2 * o + 1) * p // (2 * side) for o in range(side)], device=grid.device) for p in parts
    )
    sub = (rows[:, None] * parts[1] + columns).reshape(-1, 1)
    rest = dict(
        bias=torch.cat((bias.repeat(cells[0] * cells[1] * grid.levels, 1), bias.new_full((1, rank), ABSENT))),
        far=torch.cat([index.reshape(-1, 36 * rank) for index, _ in windows]),
        far_bias=torch.cat([torch.where(close, ABSENT, x.reshape(-1, 1, 36 * rank)) for _, x in windows]),
        results=torch.cat((results, results[:1])),
        own=(sub == arange(rank, device=grid.device)).to(grid.dtype),
    )
    return tokens + arange(count, device=grid.device).reshape(-1, grid.levels * rank), count, rest


def _loglinear(grid: Grid, cells: list[int], tokens: int) -> tuple[Tensor, int, dict]:
    """As `_linear`."""
    rank = grid.rank
    total = sum(rows * columns for rows, columns in (_level_cells(grid, i + 1) for i in range(grid.levels)))
    far, biases = [], []
    for level in range(1, grid.levels + 1):
        index, bias = _window(grid, level)
        parents = _parents(grid, level)
        below = 2**level
        close = _close(grid, [j >> (level - 1) for j in range(below)])  # [2**level, 3, 2]
        close = _outer(close, close, torch.logical_and).reshape(below, below, 1, -1, 1)
        index = torch.where(bias > ABSENT, index, total * rank).reshape(parents[0], 1, parents[1], 1, 36, rank)
        index = torch.where(close.reshape(below, 1, below, 36, 1), total * rank, index)
        index = index.reshape(parents[0] * below, parents[1] * below, 36 * rank)
        far.append(index[: cells[0], : cells[1]].reshape(-1, 36 * rank))
        biases.append(_log(grid, _outer(*(_counts(grid, level, axis) for axis in (0, 1)), torch.mul)))
    # Of the summaries, in the order in which they are stored: sub-cells, then the cells of all levels.
    bias = torch.cat(biases).transpose(-1, -2).reshape(-1)
    bias = torch.cat((bias.new_zeros(tokens), bias, bias.new_full((1,), ABSENT)))[:, None]
    return tokens + torch.cat(far, 1), total * rank, dict(bias=bias)


def _parents(grid: Grid, level: int) -> list[int]:
    side = cell_side(level + 1, grid.cell_size)
    return [n // side for n in grid.padded]


def _level_cells(grid: Grid, level: int) -> list[int]:
    return [2 * n for n in _parents(grid, level)]


def _counts(grid: Grid, level: int, axis: int, cell: Tensor | None = None) -> Tensor:
    """Tokens in the sub-cells of cells, times the number of sub-cells along the axis: `[cells, p]`."""
    side, p = cell_side(level, grid.cell_size), tiling(grid.rank, 2)[axis]
    if cell is None:
        cell = arange(_level_cells(grid, level)[axis], device=grid.device)
    start = (cell[..., None] * p + arange(p, device=grid.device)) * side
    return (grid.extents[axis] * p - start).clamp(0, side)


def _log(grid: Grid, count: Tensor) -> Tensor:
    """The score bias of summary tokens that speak for `count / rank` tokens."""
    exist = count > 0
    if not grid.count_bias:
        return torch.where(exist, 0.0, ABSENT).to(grid.dtype)
    return torch.where(exist, (count.to(grid.dtype) / grid.rank).log(), ABSENT)


def _window(grid: Grid, level: int) -> tuple[Tensor, Tensor]:
    """Of every parent of a level the summaries of its own and its neighbours' cells: rows, score bias.

    Each is `[parents, 9, 4, rank]`.
    """
    parts = tiling(grid.rank, 2)
    sizes = [_level_cells(grid, i + 1) for i in range(grid.levels)]
    total, before = (sum(rows * columns for rows, columns in some) for some in (sizes, sizes[: level - 1]))
    strides = (sizes[level - 1][1], parts[1] * total), (1, total)
    index, count = [], []
    for axis, (p, (stride, sub_stride)) in enumerate(zip(parts, strides, strict=True)):
        first = torch.tensor([[-2, -1], [0, 1], [2, 3]], device=grid.device)
        cell = arange(_parents(grid, level)[axis], device=grid.device)[:, None, None] * 2 + first
        inside = (cell >= 0) & (cell < sizes[level - 1][axis])
        cell = torch.where(inside, cell, 0)
        index.append(cell[..., None] * stride + arange(p, device=grid.device) * sub_stride)
        count.append(torch.where(inside[..., None], _counts(grid, level, axis, cell), 0))
    return _outer(*index) + before, _log(grid, _outer(*count, torch.mul))


def _close(grid: Grid, own: list[int]) -> Tensor:
    """Along an axis, which cells of a parent's window are neighbours of its own cells 0 and 1: `[len(own), 3, 2]`."""
    return torch.tensor(
        [[[abs(2 * o + c - 2 - i) <= 1 for c in (0, 1)] for o in range(3)] for i in own], device=grid.device
    )


def _outer(rows: Tensor, columns: Tensor, operation=torch.add) -> Tensor:
    """`[a, b, ..]` of rows and `[c, d, ..]` of columns to `[a * c, b * d, ..]`."""
    tails = rows.shape[1:], columns.shape[1:]
    sizes = [a * b for a, b in zip(*tails, strict=True)]
    rows = rows.reshape(-1, 1, *(size for n in tails[0] for size in (n, 1)))
    columns = columns.reshape(1, -1, *(size for n in tails[1] for size in (1, n)))
    return operation(rows, columns).reshape(-1, *sizes)
