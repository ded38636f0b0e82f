"""How the torch backend cuts arrays into tiles without gathering a single key.

A *row* of cells has one index on every axis but the last, and a stretch of that. Its arrays are copied once with the
last axis first, as a *slab* `[B * heads, X * M, channels]`, where `M` counts the positions across the row. In a slab of
queries a cell is a run of positions; in one of keys, which reaches over the neighbouring rows and cells too, a window
is a run, and the windows of consecutive cells are overlapping strided views. Positions outside the grid are in no slab.
Only a few cells' scores exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import subcells
from .cells import ABSENT, PAIRS, State, Windows, own_parts, part_index

# A slab of keys holds about this many elements, or this many cells along the last axis, however long the row.
SLAB, LEAST_CELLS = 1 << 18, 12


class Tile(NamedTuple):
    """Cells computed at once: a run of inner cells, or (a part of) one cell of several batch entries.

    Attributes:
        run: which of the two.
        batch: the entry or the slice of entries; arrays have one axis more for a run of several.
        cells: the slice of cells.
        part: of the one cell, the slice of its query positions.
    """

    run: bool
    batch: int | slice
    cells: slice
    part: slice


class Slab:
    """A slab of queries, or of a state's shared entries: indexed by a tile, it gives `[cells, positions, channels]`."""

    def __init__(self, data: Tensor, size: int, inner: int, whole_cells: bool = False):
        """`size`: positions per cell; `inner`: cells before the first cut one; `whole_cells`: no parts of cells."""
        self.data, self.size, self.inner, self.whole_cells = data, size, inner, whole_cells
        self._cells = data[:, : inner * size].unflatten(1, (inner, size)) if inner > 0 else None

    def __getitem__(self, tile: Tile) -> Tensor:
        if tile.run:
            return self._cells[tile.batch, tile.cells]
        start = tile.cells.start * self.size
        if self.whole_cells:
            return self.data[tile.batch, start : start + self.size]
        return self.data[tile.batch, start + tile.part.start : min(start + self.size, start + tile.part.stop)]

    def empty_like(self, channels: int | None = None) -> Slab:
        shape = self.data.shape if channels is None else (*self.data.shape[:-1], channels)
        return Slab(self.data.new_empty(shape), self.size, self.inner, self.whole_cells)

    def zeros_like(self) -> Slab:
        return Slab(torch.zeros_like(self.data), self.size, self.inner, self.whole_cells)


class KeySlab:
    """A slab of keys: indexed by a tile, it gives the cells' windows `[cells, window, channels]`, views of it."""

    def __init__(self, data: Tensor, step: int, cells: int, halo: int):
        """`step`: keys from one window to the next; `cells`: step lengths in a window; `halo`: cells before cell 0."""
        self.data, self.step, self.cells, self.halo = data, step, cells, halo
        self._windows = data.unfold(1, cells * step, step).movedim(-1, 2) if data.shape[1] >= cells * step else None

    def __getitem__(self, tile: Tile) -> Tensor:
        if tile.run:
            return self._windows[tile.batch, self._first(tile) : tile.cells.stop - 1 + self.halo]
        return self.data[tile.batch, self.span(tile)]

    def span(self, tile: Tile) -> slice:
        """Where the window of a tile of one cell lies."""
        first = self._first(tile)
        return slice(max(0, first) * self.step, min(self.data.shape[1], (first + self.cells) * self.step))

    def _first(self, tile: Tile) -> int:
        """The cell that the window of the tile's first cell begins with; the slab begins with cell 0."""
        return tile.cells.start - 1 + self.halo

    def zeros_like(self) -> KeySlab:
        return KeySlab(torch.zeros_like(self.data), self.step, self.cells, self.halo)

    def add_product(self, tile: Tile, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Add `scale * left^T right`, `[cells, positions, window | channels]` each, to the tile's windows."""
        if not tile.run:
            self[tile].baddbmm_(left.mT, right, alpha=scale)
            return
        # Windows overlap, their parts of one cell do not.
        for part in range(self.cells):
            start = self._first(tile) + part
            stop = start + tile.cells.stop - tile.cells.start
            keys = self.data[tile.batch, start * self.step : stop * self.step].unflatten(0, (-1, self.step))
            keys.baddbmm_(left[..., part * self.step : (part + 1) * self.step].mT, right, alpha=scale)


class Addends(NamedTuple):
    """What is added to scores: indexed by a tile, None or something broadcastable to `[cells, rows, window]`."""

    row: Row
    bias: KeySlab | None

    def __getitem__(self, tile: Tile) -> Tensor | None:
        excluded = None if self.row.windows.exclude is None else self.row.excluded(tile)
        if self.bias is None:
            return excluded
        bias = self.bias[tile].mT
        return bias if excluded is None else bias + excluded


class Carried(NamedTuple):
    """A row's shared entries of a state; by tile, scores `[cells, rows, entries]`, values `[cells, entries, ...]`."""

    row: Row
    parts: tuple[int, ...]
    lse: Slab
    value: Slab

    def __getitem__(self, tile: Tile) -> tuple[Tensor, Tensor]:
        return self.lse[tile].mT + self.row.foreign(tile, self.parts), self.value[tile]

    def zeros_like(self) -> Carried:
        return self._replace(lse=self.lse.zeros_like(), value=self.value.zeros_like())


def rows(q: Tensor, k: Tensor, windows: Windows, dtype: torch.dtype, ring=False, fused=False) -> Iterator[Row]:
    """The rows of cells of q `[B, *queries, heads, head_dim]`, k `[B, *keys, ...]` being what their windows lie in.

    With `ring`, slabs of keys are kept from one row to the next and only the row that is new is copied. The keys of a
    window are then in an order of their own, which is why there may be neither bias nor exclusions. With `fused`, no
    scores are held and a run is not cut.
    """
    *cells, last = [-(-extent // cell) for extent, cell in zip(q.shape[1:-2], windows.query_cell, strict=True)]
    ring = ring and windows.exclude is None and len(cells) == 1
    cache: dict[tuple, Tensor] = {}
    per_cell = q.shape[0] * k.shape[-2] * k.shape[-1] * windows.key_cell[-1]
    per_cell *= prod((2 + windows.after) * cell for cell in windows.key_cell[:-1])
    stretches = max(1, -(-last // max(LEAST_CELLS, SLAB // max(1, per_cell))))
    for i in range(stretches):
        stretch = range(last * i // stretches, last * (i + 1) // stretches)
        for index in product(*map(range, cells)):
            yield Row(q, k, windows, index, stretch, dtype, cache, ring, fused)


class Row:
    """One row of cells: its slabs and its tiles, in which cells count from the beginning of the stretch.

    Attributes:
        query_box, key_box: the slices of the arrays that are the row's, of queries and of keys.
        lead: for each axis but the last, the rows of the cell, and start and stop of what the grid has of its window.
        across, key_across: positions across the row.
        halo: cells of the slab of keys before cell 0.
        first, inner: the cells from `first` to `inner` are whole, and so are their windows.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        windows: Windows,
        index: tuple[int, ...],
        stretch: range,
        dtype: torch.dtype,
        cache: dict[tuple, Tensor],
        ring: bool,
        fused: bool,
    ):
        self.windows, self.index, self.stretch, self.dtype, self._cache = windows, index, stretch, dtype, cache
        self.entries, self.heads, self.device = q.shape[0], q.shape[-2], q.device
        self.query_box, self.key_box, self.lead = [], [], []
        for i, c, n, kc, kn in zip(index, windows.query_cell, q.shape[1:], windows.key_cell, k.shape[1:], strict=False):
            self.query_box.append(slice(i * c, min(n, (i + 1) * c)))
            first, last = (i - 1) * kc, (i + 1 + windows.after) * kc
            self.key_box.append(slice(max(0, first), min(kn, last)))
            self.lead.append((min(c, n - i * c), max(0, -first), min(kn, last) - first))
        self.across = prod(s.stop - s.start for s in self.query_box)
        self.key_across = prod(s.stop - s.start for s in self.key_box)
        self.cell, self.key_cell = windows.query_cell[-1], windows.key_cell[-1]
        self.window = 2 + windows.after
        self.halo = min(1, stretch.start)
        columns = slice(stretch.start * self.cell, min(q.shape[-3], stretch.stop * self.cell))
        first, last = stretch.start - self.halo, stretch.stop + windows.after
        key_columns = slice(first * self.key_cell, min(k.shape[-3], last * self.key_cell))
        self.query_box.append(columns)
        self.key_box.append(key_columns)
        self.width, self.key_width = columns.stop - columns.start, key_columns.stop - key_columns.start
        self.ring = ring and self.lead[0][1:] == (0, self.window * windows.key_cell[0])
        # Inner cells are whole, and so are their windows; runs of them are worth it where they make fewer tiles.
        self.first = 1 - self.halo
        self.inner = min(self.width // self.cell, self.key_width // self.key_cell - windows.after - self.halo)
        pairs = self.cell * self.across * self.window * self.key_cell * self.key_across
        self.tile_size = max(1, PAIRS // pairs)
        batch = self.entries * self.heads
        self.fused, self.length = fused, self.inner - self.first
        run_tiles = batch * -(-self.length // self.tile_size)
        self.run = self.length > 0 and run_tiles <= self.length * -(-batch // self.tile_size)

    def tiles(self) -> Iterator[Tile]:
        """Tiles that cover the row, each query once."""
        batch = self.entries * self.heads
        if self.run and self.fused:
            yield Tile(True, slice(None), slice(self.first, self.inner), slice(None))
        elif self.run:
            size = -(-self.length // -(-self.length // self.tile_size))  # about equal: all threads are busy
            for i, first in product(range(batch), range(self.first, self.inner, size)):
                yield Tile(True, i, slice(first, min(self.inner, first + size)), slice(None))
        most = max(1, PAIRS // (self.window * self.key_cell * self.key_across))
        for cell in range(-(-self.width // self.cell)):
            if self.run and self.first <= cell < self.inner:
                continue
            positions = min(self.cell, self.width - cell * self.cell) * self.across
            for i, start in product(range(0, batch, self.tile_size), range(0, positions, most)):
                part = slice(start, min(start + most, positions))
                yield Tile(False, slice(i, i + self.tile_size), slice(cell, cell + 1), part)

    def queries(self, x: Tensor) -> Slab:
        return Slab(self._take(x, self.query_box), self.cell * self.across, self.inner)

    def lses(self, lse: Tensor) -> Slab:
        return self.queries(lse[..., None])

    def keys(self, x: Tensor) -> KeySlab:
        if self.ring:
            data = self._turn(x)
        else:
            self._cache.pop(("ring", id(x)), None)
            data = self._take(x, self.key_box)
        return KeySlab(data, self.key_cell * self.key_across, self.window, self.halo)

    def _ring_rows(self) -> Iterator[tuple[list[slice], int]]:
        """Where the window's rows of cells lie, and their places in a ring; the newest last."""
        height = self.windows.key_cell[0]
        for row in range(self.index[0] - 1, self.index[0] + self.window - 1):
            yield [slice(row * height, (row + 1) * height), self.key_box[-1]], row % self.window

    def _turn(self, x: Tensor) -> Tensor:
        """The slab of the row before, its oldest row of cells replaced by the newest."""
        height, key = self.windows.key_cell[0], ("ring", id(x))
        rows = list(self._ring_rows())
        if key in self._cache:
            rows = rows[-1:]
        else:
            shape = (self.entries, self.heads, self.key_width, self.window, height, x.shape[-1])
            self._cache[key] = x.new_empty(shape, dtype=self.dtype)
        ring = self._cache[key]
        for box, place in rows:
            ring[:, :, :, place] = self._last_axis_first(x, box)
        return ring.flatten(2, 4).flatten(0, 1)

    def addends(self, bias: Tensor | None) -> Addends:
        """Bias `[B | 1, *keys]` and exclusions."""
        if bias is not None:
            bias = self.keys(bias[..., None, None].expand(self.entries, *bias.shape[1:], self.heads, 1))
        return Addends(self, bias)

    def before(self, state: State) -> tuple[Tensor, Tensor]:
        """What each query attended to so far: value `[B * heads, X * M, channels]` and lse `[B * heads, X * M, 1]`."""
        value, lse = state.value, state.lse[..., None]
        if state.parts is None:
            return self._take(value, self.query_box), self._take(lse, self.query_box)
        key = ("entries", self.width, *self.lead)
        if key not in self._cache:
            cells = zip(self.windows.query_cell, state.parts, self.lead, strict=False)
            lead = [subcells(cell, cell, p)[:rows] for cell, p, (rows, _, _) in cells]
            last = subcells(self.width, self.cell, state.parts[-1])
            self._cache[key] = part_index([last, *lead], [0, *state.parts[:-1]], self.device)
        entries, box = self._cache[key], self._entry_box(state)
        return self._take(value, box).index_select(1, entries), self._take(lse, box).index_select(1, entries)

    def carried(self, state: State) -> Carried:
        box, size = self._entry_box(state), prod(state.parts)
        slabs = (Slab(self._take(x, box), size, self.inner, True) for x in (state.lse[..., None], state.value))
        return Carried(self, state.parts, *slabs)

    def write(self, x: Tensor, slab: Tensor) -> None:
        self._part(x, self.query_box).copy_(self._give(slab, x, self.query_box))

    def add(self, x: Tensor, slab: Tensor, scale: float) -> None:
        self._part(x, self.query_box).add_(self._give(slab, x, self.query_box), alpha=scale)

    def add_keys(self, x: Tensor, slab: KeySlab) -> None:
        if not self.ring:
            self._part(x, self.key_box).add_(self._give(slab.data, x, self.key_box))
            return
        ring = slab.data.unflatten(1, (self.key_width, self.window, -1))
        for box, place in self._ring_rows():
            self._part(x, box).add_(self._give(ring[:, :, place].flatten(1, 2), x, box))

    def write_carried(self, state: State, carried: Carried) -> None:
        box = self._entry_box(state)
        for x, slab in ((state.value, carried.value), (state.lse[..., None], carried.lse)):
            self._part(x, box).copy_(self._give(slab.data, x, box))

    def _entry_box(self, state: State) -> list[slice]:
        box = [slice(i * p, (i + 1) * p) for i, p in zip(self.index, state.parts, strict=False)]
        return [*box, slice(self.stretch.start * state.parts[-1], self.stretch.stop * state.parts[-1])]

    def _part(self, x: Tensor, box: list[slice]) -> Tensor:
        return x[(slice(None), *box)]

    def _take(self, x: Tensor, box: list[slice]) -> Tensor:
        """`[B, *extents, heads, channels]` to a slab, in the dtype to compute in."""
        x = self._last_axis_first(x, box)
        return x.to(self.dtype).flatten(2, -2).flatten(0, 1).contiguous()

    def _last_axis_first(self, x: Tensor, box: list[slice]) -> Tensor:
        lead = len(box) - 1
        return self._part(x, box).permute(0, lead + 2, lead + 1, *range(1, lead + 1), lead + 3)

    def _give(self, slab: Tensor, x: Tensor, box: list[slice]) -> Tensor:
        """A slab as the part of x that it is of."""
        lead, shape = len(box) - 1, self._part(x, box).shape
        slab = slab.unflatten(1, (shape[lead + 1], *shape[1 : lead + 1])).unflatten(0, (shape[0], shape[-2]))
        return slab.permute(0, *range(3, lead + 3), 2, 1, lead + 3)

    def excluded(self, tile: Tile) -> Tensor:
        """`[1, rows, window]`: `ABSENT` where a pair is excluded, else 0."""
        key = ("excluded", *self.lead)
        if key not in self._cache:
            *lead, last = self.windows.exclude
            lead = [pattern[:rows, start:stop] for pattern, (rows, start, stop) in zip(lead, self.lead, strict=True)]
            self._cache[key] = torch.where(_every(last, lead), ABSENT, 0.0).to(self.dtype)
        pattern = self._cache[key]  # [cell, across, window of the last axis, key_across]
        if tile.run:
            return pattern.flatten(2).flatten(0, 1)[None]
        first = (tile.cells.start - 1 + self.halo) * self.key_cell
        stop = min(self.key_width, first + self.window * self.key_cell)
        return pattern[:, :, max(0, -first) : stop - first].flatten(2).flatten(0, 1)[None, tile.part]

    def foreign(self, tile: Tile, parts: tuple[int, ...]) -> Tensor:
        """`[1, rows, entries]`: `ABSENT` where a shared entry is of another part of the cell, else 0."""
        key = ("foreign", *self.lead)
        if key not in self._cache:
            *lead, last = own_parts(self.windows.query_cell, parts, self.device)
            lead = [pattern[:rows] for pattern, (rows, _, _) in zip(lead, self.lead, strict=True)]
            pattern = _every(last, lead).flatten(2).flatten(0, 1)
            self._cache[key] = torch.where(pattern, 0.0, ABSENT).to(self.dtype)[None]
        return self._cache[key][:, tile.part]


def _every(last: Tensor, lead: list[Tensor]) -> Tensor:
    """Where all axes' `[positions, columns]` are True: `[positions, across, columns, across]`, the last axis first."""
    pattern = last[:, None, :, None]
    for axis in lead:
        pattern = pattern[:, :, None, :, :, None] & axis[None, None, :, None, None, :]
        pattern = pattern.flatten(4, 5).flatten(1, 2)
    return pattern
