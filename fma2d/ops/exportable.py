"""The operator on images in operations that every exporter knows, with height and width left open.

It computes what the other backends compute, for two grid axes and no mask. The number of levels is fixed beforehand:
where a grid has fewer, all its cells are neighbours at the others (at most two a side), and nothing of them is attended
to. Every rearrangement is one gather along one axis, so that no operation asks how sizes or strides divide each other.

Layout: `[G, N, entries, channels]`, with `G = batch * heads`, `N` cells row by row, and what a cell holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, arange

from ..geometry import cell_side, subcell_overlaps, tiling
from ..kernels import start_kernels


def level_kernels(kernels, level, cell_size, rank, like):
    """As `fma2d.kernels.level_kernels`, of one kind and cut by axis, of sum 1."""
    if kernels:
        return [kernel.to(like.dtype) for kernel in kernels[min(level, len(kernels)) - 1]]
    start = start_kernels(level, cell_size, rank, like.dim() - 3, 1, 1, dtype=like.dtype, device=like.device)[0]
    return list(start / start.shape[-1])
from .torch_backend.cells import ABSENT
from .call import Kernels

# The children of a parent's neighbours are 6 x 6 cells; the parent's own two on an axis are number 2 and 3 of them.
WINDOW = 6


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
    batch, heads, height, width, channels = q.shape
    most = 2 * cell_side(levels + 1, cell_size)
    if height > most or width > most:
        raise ValueError(
            f"the grid has {height} x {width} tokens; the levels this was made for ({levels}) reach {most} a side"
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    tokens = [
        x.to(dtype).contiguous().view(batch * heads, height * width, channels) for x in (q * channels**-0.5, k, v)
    ]
    call = _Call(*tokens, _Lattice(height, width), heads, cell_size, rank)
    if query_kernels is None:
        out = call.loglinear(levels, key_kernels, value_kernels)
    else:
        out = call.linear(levels, key_kernels, value_kernels, query_kernels)
    return out.view(batch, heads, height, width, channels).to(q.dtype)


@dataclass
class _Lattice:
    """A lattice of `height * width` places, stored row by row in cells of `sides`."""

    height: int
    width: int
    sides: tuple[int, int] = (1, 1)

    def window(self, rows: Tensor, columns: Tensor) -> "_Window":
        """For each cell the places at `rows` `[C1, a]` and `columns` `[C2, b]`."""
        inside = ((rows >= 0) & (rows < self.height))[:, None, :, None]
        inside = inside & ((columns >= 0) & (columns < self.width))[:, None]
        rows, columns = rows.clamp(0, self.height - 1), columns.clamp(0, self.width - 1)
        a, b = self.sides
        rows = rows // a * (self.width // b * a * b) + rows % a * b
        columns = columns // b * (a * b) + columns % b
        index = rows[:, None, :, None] + columns[:, None]
        cells, entries = rows.shape[0] * columns.shape[0], rows.shape[1] * columns.shape[1]
        return _Window(index.reshape(cells * entries), inside.reshape(cells, entries))


@dataclass
class _Window:
    """The window of every cell: where its entries lie, `[N * entries]`, and whether they exist, `[N, entries]`."""

    index: Tensor
    inside: Tensor

    def take(self, x: Tensor) -> Tensor:
        """The values in the window, of `[G, places, channels]`, zero outside: `[G, N, entries, channels]`."""
        x = x.index_select(1, self.index).unflatten(1, self.inside.shape)
        return torch.where(self.inside[..., None], x, 0)


class _Call:
    """The tokens of one call (queries scaled), `[G, height * width, channels]`, and what is computed from them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grid: _Lattice, heads: int, cell_size: int, rank: int):
        self.q, self.k, self.v, self.grid = q, k, v, grid
        self.heads, self.cell_size, self.rank, self.parts = heads, cell_size, rank, tiling(rank, 2)
        self.device = q.device
        self.base = self._cells(1)
        self.offset = arange(cell_size, device=self.device)

    def loglinear(self, levels: int, key_kernels: Kernels, value_kernels: Kernels) -> Tensor:
        """`[G, H * W, 1, channels]`: each token attends to its whole cover in one softmax."""
        queries, scores, values = self._near()
        scores, values = [scores], [values]
        for level in range(1, levels + 1):
            cells = [c // 2 ** (level - 1) for c in self.base]
            summaries = self._summaries(level, (self.k, self.v), (key_kernels, value_kernels))
            keys, far_values, bias = self._far(level, cells, *summaries)
            scores.append(_scores(queries, keys, bias))
            values.append(far_values)
        _, out = _attend(torch.cat(scores, -1), torch.cat(values, 2))
        return self._by_token(out)

    def linear(self, levels: int, key_kernels: Kernels, value_kernels: Kernels, query_kernels: Kernels) -> Tensor:
        """`[G, H * W, 1, channels]`: the far field of summary queries, from the coarsest down, then of their tokens."""
        far = coarser = None
        for level in range(levels, 0, -1):
            cells = self._cells(level)
            kernels = query_kernels, key_kernels, value_kernels
            queries, *summaries = self._summaries(level, (self.q, self.k, self.v), kernels)
            keys, values, bias = self._far(level, cells, *summaries)
            if far is not None:
                # Sub-cell i lies in sub-cell i // 2 of the next level.
                axes = zip(cells, self.parts, strict=True)
                own = coarser.window(*[(c[:, None] * p + arange(p, device=self.device)) // 2 for c, p in axes])
                far = [own.take(x) for x in far]
            far = [x.flatten(1, 2) for x in _attend(_scores(queries, keys, bias), values, far)]
            coarser = _stored(cells, self.parts)
        _, scores, values = self._near()
        if far is not None:
            axes, r = zip(self.base, self.parts, strict=True), self.cell_size
            own = coarser.window(*[c[:, None] * p + (2 * self.offset + 1) * p // (2 * r) for c, p in axes])
            far = [own.take(x) for x in far]
        _, out = _attend(scores, values, far)
        return self._by_token(out)

    def _near(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, scores and values of the base cells and their neighbours."""
        reach = arange(3 * self.cell_size, device=self.device) - self.cell_size
        own, around = (
            self.grid.window(*[c[:, None] * self.cell_size + offset for c in self.base])
            for offset in (self.offset, reach)
        )
        queries, bias = own.take(self.q), _log_count(around.inside.to(self.k.dtype))
        return queries, _scores(queries, around.take(self.k), bias), around.take(self.v)

    def _far(self, level: int, cells: list[Tensor], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A level's summary keys and values in these cells' windows, `[G, N, entries, channels]`, and their bias."""
        place = arange(WINDOW, device=self.device)
        lattice = _Lattice(*[c.shape[0] for c in self._cells(level)])
        window = lattice.window(*[c[:, None] // 2 * 2 - 2 + place for c in cells])
        keys, values, counts = (
            window.take(x.flatten(2)).unflatten(-1, (self.rank, -1)).flatten(2, 3)
            for x in (keys, values, self._counts(level))
        )
        rows, columns = ((place - 2 - c[:, None] % 2).abs() <= 1 for c in cells)
        neighbours = (rows[:, None, :, None] & columns[:, None]).reshape(-1, WINDOW**2, 1).expand(-1, -1, self.rank)
        return keys, values, _log_count(torch.where(neighbours.flatten(1), 0, counts[0, ..., 0]))

    def _summaries(self, level: int, tokens: Sequence[Tensor], kernels: Sequence[Kernels]) -> list[Tensor]:
        """Summary tokens of a level: `[G, N, rank, channels]` of each."""
        side, places = cell_side(level, self.cell_size), self._places(level)
        window, exist = self.grid.window(*places), self._exist(places)
        found = []
        for x, own in zip(tokens, kernels, strict=True):
            axes = level_kernels(own, level, self.cell_size, self.rank, x[:, None, None])
            rows, columns = (w.shape[-1] for w in axes)
            x = window.take(x).unflatten(2, (rows, side // rows, columns, side // columns))
            x = x.sum((3, 5)).flatten(2, 3).unflatten(0, (-1, self.heads))  # [B, heads, N, bins, channels]
            weights = axes[0][..., :, None] * axes[1][..., None, :] * (rows * columns / side**2)
            weights = weights.flatten(-2).mT[:, :, None]  # [rank, heads | 1, 1, bins, channels | 1]
            # [C, rank, heads | 1, channels | 1] of each axis
            rows, columns = (_cut_scale(w, e) for w, e in zip(axes, exist, strict=True))
            scale = (rows[:, None] * columns).flatten(0, 1).permute(2, 0, 1, 3)
            found.append((torch.stack([(x * w).sum(3) for w in weights], 3) * scale).flatten(0, 1))
        return found

    def _counts(self, level: int) -> Tensor:
        """How many tokens each summary token of a level speaks for: `[1, N, rank, 1]`."""
        rows, columns = (
            exist @ exist.new_tensor(subcell_overlaps(cell_side(level, self.cell_size), p)).T
            for exist, p in zip(self._exist(self._places(level)), self.parts, strict=True)
        )
        return (rows[:, None, :, None] * columns[:, None] / self.rank).reshape(1, -1, self.rank, 1)

    def _cells(self, level: int) -> list[Tensor]:
        """For each axis the indices of a level's cells."""
        side = cell_side(level, self.cell_size)
        return [arange((n + side - 1) // side, device=self.device) for n in (self.grid.height, self.grid.width)]

    def _places(self, level: int) -> list[Tensor]:
        """For each axis the tokens of a level's cells, `[C, side]`; the last ones may not exist."""
        side = cell_side(level, self.cell_size)
        return [c[:, None] * side + arange(side, device=self.device) for c in self._cells(level)]

    def _exist(self, places: list[Tensor]) -> list[Tensor]:
        """For each axis 1 where there is a token, else 0."""
        extents = (self.grid.height, self.grid.width)
        return [(place < n).to(self.k.dtype) for place, n in zip(places, extents, strict=True)]

    def _by_token(self, x: Tensor) -> Tensor:
        rows, columns = (arange(n, device=self.device)[:, None] for n in (self.grid.height, self.grid.width))
        return _stored(self.base, (self.cell_size, self.cell_size)).window(rows, columns).take(x.flatten(1, 2))


def _stored(cells: list[Tensor], sides: tuple[int, int]) -> _Lattice:
    """The lattice of what these cells hold, `sides` entries each."""
    return _Lattice(*[c.shape[0] * side for c, side in zip(cells, sides, strict=True)], sides)


def _cut_scale(weights: Tensor, exist: Tensor) -> Tensor:
    """What cut cells are scaled by along an axis, `[C, rank, heads | 1, channels | 1]`.

    The weight of all of a cell's places over that of those with a token, where `exist`, `[C, side]`, is 1.
    """
    size, bins = weights.abs(), weights.shape[-1]
    width = exist.shape[1] // bins
    exist = exist.unflatten(1, (bins, width)).sum(-1)[:, None, None, None]
    whole, left = size.sum(-1) * width, (size * exist).sum(-1)
    return torch.where(left > 0, whole / torch.where(left > 0, left, 1), 0)


def _scores(queries: Tensor, keys: Tensor, bias: Tensor) -> Tensor:
    """`[G, N, queries, keys]`."""
    scores = torch.bmm(queries.flatten(0, 1), keys.flatten(0, 1).mT)
    return scores.unflatten(0, queries.shape[:2]) + bias[:, None]


def _attend(scores: Tensor, values: Tensor, far: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """`(lse, out)`, `[G, N, queries, 1 | channels]`, over entries and, as one more of them, `(lse, out)` of others."""
    if far is not None:
        scores = torch.cat((scores, far[0]), -1)
    p = scores.softmax(-1)
    near = p if far is None else p[..., :-1]
    out = torch.bmm(near.flatten(0, 1), values.flatten(0, 1)).unflatten(0, values.shape[:2])
    return scores.logsumexp(-1, keepdim=True), out if far is None else out + p[..., -1:] * far[1]


def _log_count(count: Tensor) -> Tensor:
    """The score bias of entries that speak for `count` tokens."""
    return torch.where(count > 0, torch.where(count > 0, count, 1).log(), ABSENT)
