"""How the torch backend cuts arrays into tiles where cells are small: by gathering the windows of many cells at once.

Summary tokens' windows are so small that slabs (`slabs.py`) would be all overhead. Here the arrays are padded to whole
cells and windows, what is outside the grid being absent, and one run of cells along the first axis is one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..geometry import subcells
from .cells import ABSENT, PAIRS, State, Windows, own_parts, part_index

# Up to this many (query, key) pairs a cell, windows are gathered.
SMALL = 1 << 12
# A run gathers about this many elements of keys.
GATHERED = 1 << 19


def pairs_per_cell(windows: Windows) -> int:
    return prod(windows.query_cell) * prod((2 + windows.after) * c for c in windows.key_cell)


def runs(q: Tensor, k: Tensor, windows: Windows, dtype: torch.dtype) -> Iterator[Run]:
    """The runs of cells of q `[B, *queries, heads, head_dim]`, k `[B, *keys, ...]` being what their windows lie in."""
    cells = [-(-n // c) for n, c in zip(q.shape[1:-2], windows.query_cell, strict=True)]
    elements = prod((2 + windows.after) * c for c in windows.key_cell) * k.shape[-1]
    most = min(PAIRS // pairs_per_cell(windows), GATHERED // max(1, elements))
    slices = max(1, most // (prod(cells[1:]) * q.shape[-2]))
    entries, length = max(1, slices // cells[0]), min(slices, cells[0])
    patterns: dict[str, Tensor] = {}
    for entry, start in product(range(0, q.shape[0], entries), range(0, cells[0], length)):
        stop = min(cells[0], start + length)
        batch, run = slice(entry, entry + entries), [stop - start, *cells[1:]]
        yield Run(k, windows, batch, start, run, patterns, dtype)


class Part:
    """What a run has of an array: `[cells, positions, channels]`. There is one tile, whose index is None."""

    def __init__(self, data: Tensor):
        self.data = data

    def __getitem__(self, tile: None) -> Tensor:
        return self.data

    def empty_like(self, channels: int | None = None) -> Part:
        return Part(self.data.new_empty((*self.data.shape[:-1], channels or self.data.shape[-1])))

    def zeros_like(self) -> Part:
        return Part(torch.zeros_like(self.data))

    def add_product(self, tile: None, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Add `scale * left^T right`."""
        self.data.baddbmm_(left.mT, right, alpha=scale)


class Carried:
    """A run's shared entries of a state: scores `[cells, rows, entries]` and `[cells, entries, ...]`."""

    def __init__(self, lse: Part, value: Part, foreign: Tensor):
        self.lse, self.value, self.foreign = lse, value, foreign

    def __getitem__(self, tile: None) -> tuple[Tensor, Tensor]:
        return self.lse.data.mT + self.foreign, self.value.data

    def zeros_like(self) -> Carried:
        return Carried(self.lse.zeros_like(), self.value.zeros_like(), self.foreign)


class Run:
    """A run of cells along the first axis, across all others, of some batch entries."""

    def __init__(
        self,
        k: Tensor,
        windows: Windows,
        batch: slice,
        start: int,
        cells: list[int],
        patterns: dict,
        dtype: torch.dtype,
    ):
        self.windows, self.batch, self.start, self.cells = windows, batch, start, cells
        self.keys_shape, self.device = k.shape, k.device
        self.dtype, self._patterns = dtype, patterns

    def tiles(self) -> list[None]:
        return [None]

    def queries(self, x: Tensor) -> Part:
        return self._cut(x, self.windows.query_cell)

    def lses(self, lse: Tensor) -> Part:
        """`[cells, rows, 1]`; a row outside the grid is an empty query."""
        return self._cut(lse[..., None], self.windows.query_cell, -ABSENT)

    def keys(self, x: Tensor, absent: float = 0.0) -> Part:
        """The windows of `[B, *keys, heads, channels]`."""
        cell, ndim = self.windows.key_cell, len(self.cells)
        rows, padding = self._window_box(x)
        x = pad(x[self.batch, rows].to(self.dtype), padding, value=absent)
        for axis, size in enumerate(cell, 1):
            x = x.unfold(axis, (2 + self.windows.after) * size, size)
        x = x.permute(*range(ndim + 2), *range(ndim + 3, 2 * ndim + 3), ndim + 2)
        return Part(x.flatten(ndim + 2, -2).flatten(0, ndim + 1))

    def addends(self, bias: Tensor | None) -> Part:
        """Bias `[B | 1, *keys]` and exclusions, `ABSENT` outside the grid: `[cells, rows | 1, window]`."""
        if bias is None:
            bias = torch.zeros(1, *self.keys_shape[1:-2], dtype=self.dtype, device=self.device)
        bias = bias[..., None, None].expand(self.keys_shape[0], *bias.shape[1:], self.keys_shape[-2], 1)
        addend = self.keys(bias, ABSENT).data.mT
        if self.windows.exclude is not None:
            addend = addend + self._pattern("excluded", self.windows.exclude, ABSENT, 0.0)
        return Part(addend)

    def before(self, state: State) -> tuple[Tensor, Tensor]:
        """What each query attended to so far: value `[cells, rows, channels]` and lse `[cells, rows, 1]`."""
        cell, slabs = self.windows.query_cell, (state.value, state.lse[..., None])
        if state.parts is None:
            return tuple(self._cut(x, cell).data for x in slabs)
        parts = [subcells(c, c, p) for c, p in zip(cell, state.parts, strict=True)]
        index = part_index(parts, list(state.parts), state.lse.device)
        return tuple(self._cut(x, state.parts).data.index_select(1, index) for x in slabs)

    def carried(self, state: State) -> Carried:
        own = own_parts(self.windows.query_cell, state.parts, state.lse.device)
        foreign = self._pattern("foreign", own, 0.0, ABSENT)
        return Carried(self._cut(state.lse[..., None], state.parts), self._cut(state.value, state.parts), foreign)

    def write(self, x: Tensor, data: Tensor) -> None:
        self._put(x, data, self.windows.query_cell)

    def write_carried(self, state: State, carried: Carried) -> None:
        self._put(state.lse[..., None], carried.lse.data, state.parts)
        self._put(state.value, carried.value.data, state.parts)

    def add(self, x: Tensor, data: Tensor, scale: float) -> None:
        rows, data = self._join(x, data, self.windows.query_cell)
        x[self.batch, rows].add_(data, alpha=scale)

    def add_keys(self, x: Tensor, part: Part) -> None:
        """Add windows where they lie in `[B, *keys, heads, channels]`."""
        cell, ndim = self.windows.key_cell, len(self.cells)
        rows, padding = self._window_box(x)
        target = x[self.batch, rows]
        total = pad(torch.zeros_like(target), padding)
        for axis, size in enumerate(cell):
            total = total.unflatten(1 + 2 * axis, (-1, size))
        window = [(2 + self.windows.after) * size for size in cell]
        data = part.data.unflatten(0, (target.shape[0], *self.cells, -1)).unflatten(ndim + 2, window)
        for index in product(range(2 + self.windows.after), repeat=ndim):
            piece, cells = data, [slice(None)]
            for axis, (i, size) in enumerate(zip(index, cell, strict=True)):
                piece = piece.narrow(ndim + 2 + axis, i * size, size)
                cells += [slice(i, i + self.cells[axis]), slice(None)]
            order = [a for axis in range(ndim) for a in (1 + axis, ndim + 2 + axis)]
            total[tuple(cells)].add_(piece.permute(0, *order, ndim + 1, -1))
        for axis in range(1, ndim + 1):
            total = total.flatten(axis, axis + 1)
        crop = [slice(p, p + n) for p, n in zip(padding[-2::-2][:ndim], target.shape[1 : ndim + 1], strict=True)]
        target.add_(total[(slice(None), *crop)])

    def _window_box(self, x: Tensor) -> tuple[slice, tuple[int, ...]]:
        """The part of `[B, *keys, heads, channels]` along its first axis that the windows lie in, and its padding."""
        cell, after = self.windows.key_cell, self.windows.after
        first = (self.start - 1) * cell[0]
        rows = slice(max(0, first), min(x.shape[1], first + (self.cells[0] + 1 + after) * cell[0]))
        padding = []
        for axis, (size, cells) in enumerate(zip(cell, self.cells, strict=True)):
            before = rows.start - first if axis == 0 else size
            extent = rows.stop - rows.start if axis == 0 else x.shape[1 + axis]
            padding.append((before, (cells + 1 + after) * size - before - extent))
        return rows, (0, 0, 0, 0, *(p for pair in reversed(padding) for p in pair))

    def _cut(self, x: Tensor, cell: tuple[int, ...], absent: float = 0.0) -> Part:
        """`[B, *positions, heads, channels]` by cells: `[cells, positions of a cell, channels]`."""
        ndim = len(cell)
        x = x[self.batch, self.start * cell[0] : (self.start + self.cells[0]) * cell[0]].to(self.dtype)
        padding = [p for n, c, size in zip(x.shape[1:], self.cells, cell, strict=False) for p in (c * size - n, 0)]
        if any(padding):
            x = pad(x, (0, 0, 0, 0, *reversed(padding)), value=absent)
        for axis, size in enumerate(cell):
            x = x.unflatten(1 + 2 * axis, (-1, size))
        x = x.permute(0, *range(1, 2 * ndim, 2), -2, *range(2, 2 * ndim + 1, 2), -1)
        return Part(x.flatten(ndim + 2, -2).flatten(0, ndim + 1))

    def _join(self, x: Tensor, data: Tensor, cell: tuple[int, ...]) -> tuple[slice, Tensor]:
        """The inverse of `_cut`: the part of x along its first axis, and what `data` has for it."""
        ndim = len(cell)
        rows = slice(self.start * cell[0], min(x.shape[1], (self.start + self.cells[0]) * cell[0]))
        data = data.unflatten(1, cell).unflatten(0, (-1, *self.cells, x.shape[-2]))
        data = data.permute(0, *(a for axis in range(ndim) for a in (1 + axis, ndim + 2 + axis)), ndim + 1, -1)
        for axis in range(1, ndim + 1):
            data = data.flatten(axis, axis + 1)
        crop = (slice(rows.stop - rows.start), *(slice(n) for n in x.shape[2 : ndim + 1]))
        return rows, data[(slice(None), *crop)]

    def _put(self, x: Tensor, data: Tensor, cell: tuple[int, ...]) -> None:
        rows, data = self._join(x, data, cell)
        x[self.batch, rows].copy_(data)

    def _pattern(self, name: str, axes: tuple[Tensor, ...], true: float, false: float) -> Tensor:
        """`true` where all axes' `[positions, columns]` are True, else `false`: `[1, positions, columns]`."""
        if name not in self._patterns:
            pattern = axes[0]
            for axis in axes[1:]:
                pattern = (pattern[:, None, :, None] & axis[None, :, None, :]).flatten(2, 3).flatten(0, 1)
            self._patterns[name] = torch.where(pattern, true, false).to(self.dtype)[None]
        return self._patterns[name]
