"""The geometry of the cover: pure integers, any number of axes, any extents.

Words: the *grid* is the token lattice; a level-`l` *cell* has side `cell_size * 2**(l - 1)`; a *parent* is the cell of
the next level that holds a cell; *neighbours* differ by at most one on every axis; the *interaction list* of a cell is
the children of its parent's neighbours that are not its own neighbours. Every backend takes its tables from here.
Source: Kang, Tran, De Sterck, arXiv:2310.11960v4, sections 3 and 4, with ragged edges added.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import prod
from numbers import Integral

import torch

from .checks import check_bool, check_integers, check_positive

Grid = tuple[int, ...]
Span = tuple[int, int]


def check_grid(grid: Grid, cell_size: int) -> None:
    """Raise TypeError or ValueError unless `grid` has 1 to 3 integers of at least 1 and `cell_size` is one."""
    check_positive("cell_size", cell_size)
    if not isinstance(grid, Sequence):
        raise TypeError(f"grid must be a sequence of integers, got {grid!r}")
    integers = all(isinstance(extent, (Integral, torch.SymInt)) and not isinstance(extent, bool) for extent in grid)
    if not integers and not torch.jit.is_tracing():  # whose sizes are tensors, as a compiler's are symbols
        raise TypeError(f"grid must be of integers, got {tuple(grid)}")
    if not 1 <= len(grid) <= 3:
        raise ValueError(f"grid must have 1, 2 or 3 axes, got {len(grid)}: {tuple(grid)}")
    if min(grid) < 1:
        raise ValueError(f"grid must have at least one token on every axis, got {tuple(grid)}")


def check_token(token: tuple[int, ...], grid: Grid) -> None:
    """Raise TypeError or ValueError unless `token` is an index into the grid."""
    check_integers("token", token)
    if len(token) != len(grid) or not all(0 <= t < extent for t, extent in zip(token, grid, strict=True)):
        raise ValueError(f"token must be an index into the grid {tuple(grid)}, got {tuple(token)}")


def num_levels(grid: Grid, cell_size: int) -> int:
    """Number `L` of coarse levels: the level-`(L + 1)` grid has at most two cells a side.

    Args:
        grid: token extents, 1 to 3 of them.
        cell_size: tokens per side of a base cell.
    """
    check_grid(grid, cell_size)
    base_cells = max(-(-extent // cell_size) for extent in grid)
    return max(0, (int(base_cells) - 1).bit_length() - 1)


def cell_side(level: int, cell_size: int) -> int:
    """Tokens per side of a cell of `level` (1, 2, ...); level 0 is the near field, whose cells are the base cells."""
    return cell_size << max(0, level - 1)


def num_cells(grid: Grid, side: int) -> Grid:
    """Cells of the given side on every axis, the cut ones at the far edges included."""
    return tuple(-(-extent // side) for extent in grid)


@lru_cache
def tiling(rank: int, ndim: int) -> tuple[int, ...]:
    """The sub-cell tiling `p_1 <= .. <= p_D` of a cell: the factors of `rank` with the least `p_D - p_1`."""

    def factors(rest: int, axes: int, least: int):
        if axes == 1:
            yield (rest,)
            return
        for first in range(least, rest + 1):
            if first**axes > rest:  # those after it are no smaller
                break
            if rest % first == 0:
                yield from ((first, *tail) for tail in factors(rest // first, axes - 1, first) if tail[0] >= first)

    return min(factors(rank, ndim, 1), key=lambda parts: (parts[-1] - parts[0], parts))


def subcells(extent: int, side: int, parts: int) -> tuple[int, ...]:
    """For every token of an axis, its sub-cell counted along the whole axis: `cell * parts + sub-cell`.

    The sub-cell is the one that holds the token's midpoint. Sub-cells nest: sub-cell `i` of one level lies in
    sub-cell `i // 2` of the next.
    """
    return tuple(t // side * parts + (2 * (t % side) + 1) * parts // (2 * side) for t in range(extent))


def subcell_overlaps(side: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """`[parts][side]`: how much of each token of a cell lies in each sub-cell, in units of `1 / parts` tokens."""
    return tuple(
        tuple(max(0, min((o + 1) * parts, (k + 1) * side) - max(o * parts, k * side)) for o in range(side))
        for k in range(parts)
    )


def subcell_counts(extent: int, side: int, parts: int) -> tuple[int, ...]:
    """For every sub-cell of an axis, the tokens of the grid in it, in units of `1 / parts` tokens."""
    return tuple(max(0, min(side, extent * parts - i * side)) for i in range(-(-extent // side) * parts))


def neighbours(cell: int, cells: int) -> range:
    """Indices of the neighbours of a cell on one axis that has `cells` cells."""
    return range(max(0, cell - 1), min(cells, cell + 2))


def count_pairs(grid: Grid, cell_size: int, rank: int, *, linear: bool, causal: bool = False) -> tuple[int, int]:
    """Pairs of a query and what it attends to, `(near, far)`: as many as there are scores.

    A coarse cell counts `rank` summary tokens, in the linear variant as many queries, too.
    """

    def count(side: int, seen, whole_cells: bool = False):
        """The product over axes of what `seen` counts, summed over the tokens, or the cells, of the axis."""
        axes = [[min(side, extent - start) for start in range(0, extent, side)] for extent in grid]
        return prod(sum((1 if whole_cells else n) * seen(i, sizes) for i, n in enumerate(sizes)) for sizes in axes)

    def near_tokens(cell: int, sizes: list[int]) -> float:
        if causal:  # of the own cell, half of the pairs and half of the diagonal
            return (sizes[cell] + 1) / 2 + sum(sizes[max(0, cell - 1) : cell])
        return sum(sizes[i] for i in neighbours(cell, len(sizes)))

    def children(cell: int, sizes: list[int]) -> int:
        parents = neighbours(cell // 2, -(-len(sizes) // 2))
        return (cell if causal else min(len(sizes), 2 * parents.stop)) - 2 * parents.start

    def adjacent(cell: int, sizes: list[int]) -> int:
        return min(1, cell) if causal else len(neighbours(cell, len(sizes)))

    far = 0
    for level in range(1, num_levels(grid, cell_size) + 1):
        side = cell_side(level, cell_size)
        cells = count(side, children, linear) - count(side, adjacent, linear)
        far += cells * rank * (rank if linear else 1)
    return int(count(cell_size, near_tokens)), far


def cover(
    grid: Grid, cell_size: int, token: tuple[int, ...], causal: bool = False
) -> tuple[list[tuple[int, ...]], list[tuple[int, tuple[int, ...], tuple[Span, ...]]]]:
    """What the query at `token` attends to: every token of the grid exactly once, near or in one coarse cell.

    Args:
        grid: token extents, 1 to 3 of them.
        cell_size: tokens per side of a base cell.
        token: index of the query, one integer an axis.
        causal: keep only what is not to the right of the token (1D only).

    Returns:
        `(near, far)`: the near tokens as index tuples in row-major order, and the coarse cells as sorted
        `(level, cell index, ((start, stop), ...))`, clipped to the grid.

    Raises:
        TypeError: for what is of no integers, a causal that is no bool.
        ValueError: for an empty grid, a cell size below 1, a token outside the grid, causal in more than one dimension.
    """
    levels = num_levels(grid, cell_size)
    check_token(token, grid)
    check_bool("causal", causal)
    grid, token = tuple(grid), tuple(token)
    if causal and len(grid) != 1:
        raise ValueError(f"causal needs a grid of one axis, got {grid}")

    def span(cells: range, side: int, extent: int) -> range:
        return range(cells.start * side, min(extent, cells.stop * side))

    base_cells = num_cells(grid, cell_size)
    near_axes = [
        span(neighbours(t // cell_size, c), cell_size, extent)
        for t, c, extent in zip(token, base_cells, grid, strict=True)
    ]
    near = [n for n in product(*near_axes) if not causal or n <= token]

    far = []
    for level in range(1, levels + 1):
        side = cell_side(level, cell_size)
        cells = num_cells(grid, side)
        own = tuple(t // side for t in token)
        parents = [neighbours(o // 2, -(-c // 2)) for o, c in zip(own, cells, strict=True)]
        children = [range(2 * p.start, min(c, 2 * p.stop)) for p, c in zip(parents, cells, strict=True)]
        for cell in product(*children):
            is_neighbour = all(abs(c - o) <= 1 for c, o in zip(cell, own, strict=True))
            if not is_neighbour and (not causal or cell < own):
                bounds = tuple((c * side, min(extent, (c + 1) * side)) for c, extent in zip(cell, grid, strict=True))
                far.append((level, cell, bounds))
    return near, far
