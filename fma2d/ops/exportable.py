"""The operator on images in operations that every exporter knows, with height and width left open.

It computes what the other backends compute, for two grid axes and no mask. The number of levels is fixed beforehand:
where a grid has fewer, all its cells are neighbours at the others (at most two a side), and nothing of them is attended
to. Rows and columns are cut into cells and windows by index, so no operation depends on whether a size divides another.

Layout: tokens and lattices `[B, heads, rows, columns, channels]`; by cell `[B, heads, C1, C2, entries, channels]`.
"""

import torch
from torch import Tensor

from ..aggregation import level_kernels
from ..geometry import cell_side, subcell_overlaps, tiling

# The score of what is not attended to. Finite: a far field that does not exist has no NaN and loses to any near token.
ABSENT = -1e30
# The children of a parent's neighbours are 6 x 6 cells; the parent's own two on an axis are number 2 and 3 of them.
WINDOW = 6

Kernels = list[list[Tensor]]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_kernels: Kernels,
    value_kernels: Kernels,
    query_kernels: Kernels | None,
    *,
    levels: int,
    cell_size: int,
    rank: int,
) -> Tensor:
    """`fma2d.multipole_attention` on `[B, heads, H, W, head_dim]`, for grids of at most `levels` levels.

    Args:
        levels: coarse levels to unroll, whether a grid has them or not.
        The others as in `fma2d.multipole_attention`.

    Raises:
        ValueError: if the grid has more levels.
    """
    grid, most = q.shape[2:4], 2 * cell_side(levels + 1, cell_size)
    if grid[0] > most or grid[1] > most:
        raise ValueError(
            f"the grid has {grid[0]} x {grid[1]} tokens; the {levels} levels this was made for reach {most} a side"
        )
    out_dtype, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), v.to(dtype)

    def far(level: int, cells: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values `[.., entries, head_dim]` and score bias `[.., 1, entries]` of these cells of a level."""
        starts = [cell // 2 * 2 - 2 for cell in cells]
        summaries = (_summaries(x, w, level, cell_size, rank) for x, w in ((k, key_kernels), (v, value_kernels)))
        keys, values, counts = (
            _windows(x.flatten(-2), starts, WINDOW).unflatten(-1, (rank, -1)).flatten(-3, -2)
            for x in (*summaries, _counts(grid, level, cell_size, rank, q))
        )
        return keys, values, _log_count(counts) + _neighbour_bias(cells, rank, q)

    base = _cells(grid, cell_size, q)
    queries = _windows(q, [cell * cell_size for cell in base], cell_size)
    starts = [(cell - 1) * cell_size for cell in base]
    keys, values, exists = (_windows(x, starts, 3 * cell_size) for x in (k, v, q.new_ones(1, 1, *grid, 1)))
    near = queries @ keys.mT + _log_count(exists)

    state = None
    if query_kernels is None:
        scores, entries = [near], [values]
        for level in range(1, levels + 1):
            keys, values, bias = far(level, [cell // 2 ** (level - 1) for cell in base])
            scores.append(queries @ keys.mT + bias)
            entries.append(values)
        near, values = torch.cat(scores, -1), torch.cat(entries, -2)
    else:
        parts = tiling(rank, 2)
        for level in range(levels, 0, -1):
            cells = _cells(grid, cell_side(level, cell_size), q)
            keys, far_values, bias = far(level, cells)
            score = _summaries(q, query_kernels, level, cell_size, rank) @ keys.mT + bias
            if state is not None:
                # Sub-cell i lies in sub-cell i // 2 of the next level.
                own = [torch.arange(c.shape[0] * p, device=q.device) // 2 for c, p in zip(cells, parts, strict=True)]
                state = [_split(_take(x, own), parts) for x in state]
            state = [_join(x, parts) for x in _merge(score, far_values, state)]
        if state is not None:
            token = torch.arange(cell_size, device=q.device)
            own = [
                (cell[:, None] * p + (2 * token + 1) * p // (2 * cell_size)).flatten()
                for cell, p in zip(base, parts, strict=True)
            ]
            state = [_split(_take(x, own), (cell_size, cell_size)) for x in state]
    _, out = _merge(near, values, state)
    rows = [torch.arange(n, device=q.device) for n in grid]
    return _take(_join(out, (cell_size, cell_size)), rows).to(out_dtype)


def _merge(score: Tensor, values: Tensor, state: list[Tensor] | None) -> tuple[Tensor, Tensor]:
    """`(lse, out)` over entries and, as one more of them, the `(lse, out)` of coarser levels."""
    if state is None:
        return score.logsumexp(-1, keepdim=True), score.softmax(-1) @ values
    lse, out = state
    score = torch.cat((score, lse), -1)
    p = score.softmax(-1)
    return score.logsumexp(-1, keepdim=True), p[..., :-1] @ values + p[..., -1:] * out


def _summaries(x: Tensor, kernels: Kernels, level: int, cell_size: int, rank: int) -> Tensor:
    """Summary tokens of a level: `[B, heads, C1, C2, rank, head_dim]`."""
    side, heads, head_dim = cell_side(level, cell_size), x.shape[1], x.shape[-1]
    scales, weights = [], []
    for axis, w in enumerate(level_kernels(kernels, level, cell_size, rank, x), 2):
        bins, extent = w.shape[-1], x.shape[axis]
        block = side // bins
        (cells,) = _cells((extent,), side, x)
        token = (cells[:, None] * side + torch.arange(side, device=x.device)).flatten()
        x = _pick(x, axis, token).unflatten(axis, (cells.shape[0] * bins, block)).sum(axis + 1)
        weights.append(w / block)
        # What a cut cell's summary is scaled by: the weight of all places over that of those with a token.
        size = w.abs()
        exist = (token < extent).to(w.dtype).reshape(-1, bins, block).sum(-1)
        whole, left = size.sum(-1) * block, (size * exist[:, None, None, None]).sum(-1)
        scales.append(torch.where(left > 0, whole / torch.where(left > 0, left, 1), 0))  # [C, p, heads | 1, d | 1]
    rows, columns = weights
    joint = (rows[..., :, None] * columns[..., None, :]).flatten(-2).expand(-1, heads, head_dim, -1)
    summary = torch.einsum("bhxyed,phde->bhxypd", _split(x, (rows.shape[-1], columns.shape[-1])), joint)
    scale = scales[0][:, None] * scales[1][None]
    return summary * scale.permute(3, 0, 1, 2, 4)


def _counts(grid, level: int, cell_size: int, rank: int, like: Tensor) -> Tensor:
    """`n(C, k)` of a level's summary tokens: `[1, 1, C1, C2, rank, 1]`."""
    side = cell_side(level, cell_size)
    counts = []
    for extent, p in zip(grid, tiling(rank, 2), strict=True):
        (cells,) = _cells((extent,), side, like)
        exist = (cells[:, None] * side + torch.arange(side, device=like.device) < extent).to(like.dtype)
        counts.append(exist @ torch.tensor(subcell_overlaps(side, p), dtype=like.dtype, device=like.device).T)
    count = counts[0][:, None, :, None] * counts[1][None, :, None, :]
    return (count / rank).flatten(2)[None, None, ..., None]


def _log_count(count: Tensor) -> Tensor:
    """Score bias `[.., 1, entries]` of entries that speak for `count` tokens `[.., entries, 1]`."""
    return torch.where(count > 0, torch.where(count > 0, count, 1).log(), ABSENT).mT


def _neighbour_bias(cells: list[Tensor], rank: int, like: Tensor) -> Tensor:
    """Score bias `[C1, C2, 1, entries]` that leaves out the neighbours among the entries of a window."""
    place = torch.arange(WINDOW, device=like.device)
    rows, columns = ((place - 2 - cell[:, None] % 2).abs() <= 1 for cell in cells)
    neighbour = (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2)
    bias = torch.where(neighbour, ABSENT, 0.0).to(like.dtype)
    return bias[..., None].expand(-1, -1, -1, rank).flatten(2)[:, :, None]


def _cells(grid, side: int, like: Tensor) -> list[Tensor]:
    """For each axis the indices of its cells."""
    return [torch.arange((extent + side - 1) // side, device=like.device) for extent in grid]


def _pick(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Entries of an axis by index; outside there are zeros."""
    extent = x.shape[axis]
    inside = (index >= 0) & (index < extent)
    picked = x.index_select(axis, index.clamp(0, extent - 1))
    return torch.where(inside.reshape(-1, *(1,) * (x.dim() - axis - 1)), picked, 0)


def _take(x: Tensor, index: list[Tensor]) -> Tensor:
    """Rows and columns by index."""
    return x.index_select(2, index[0]).index_select(3, index[1])


def _windows(x: Tensor, starts: list[Tensor], size: int) -> Tensor:
    """Windows of `size x size` places, one for each pair of starts: `[.., C1, C2, size * size, channels]`."""
    place = torch.arange(size, device=x.device)
    for axis, start in enumerate(starts, 2):
        x = _pick(x, axis, (start[:, None] + place).flatten())
    return _split(x, (size, size))


def _split(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """A lattice `[.., C1 * sides[0], C2 * sides[1], channels]` by cell, `[.., C1, C2, sides[0] * sides[1], channels]`."""
    x = x.unflatten(3, (-1, sides[1])).unflatten(2, (-1, sides[0]))
    return x.transpose(3, 4).flatten(4, 5)


def _join(x: Tensor, sides: tuple[int, int]) -> Tensor:
    """The inverse of `_split`."""
    return x.unflatten(4, sides).transpose(3, 4).flatten(4, 5).flatten(2, 3)
