"""Tiles of single cells, for grids of many: each cell's queries see a window of keys.

A row of cells is copied once as a *slab*, its last axis first, `[B * heads, X, rows, channels]`, with one cell more at
either end: a neighbour, or an absent one. In a slab of queries a cell is a run of positions; in one of keys, which
reaches over the rows of cells around it, a window is a run too, and the windows of consecutive cells are overlapping
strided views: no key is gathered. Keys have one channel more, their bias, and queries a 1 in its place.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .cells import ABSENT, PAIRS, Box, Relation, attend, attend_backward, is_followed

# A slab holds about this many positions along X, or this many cells, however long the row.
LENGTH, LEAST_CELLS = 1 << 11, 32


class KeyRows:
    """The slabs of keys and values of one row of cells after another; from row to row only what is new is copied.

    The rows of a window are then in an order of their own, which is why nothing may depend on it (`ordered`).
    """

    def __init__(self, arrays: tuple[Tensor, ...], bias: Tensor | None, relation: Relation, dtype, ordered: bool):
        self.arrays, self.bias, self.relation, self.dtype = arrays, bias, relation, dtype
        self.keep = not ordered and not is_followed()
        self.slabs: list[Tensor] = []
        self.d_slabs: list[Tensor] = []  # their gradients, if asked for
        self.targets: tuple[Tensor, ...] = ()  # where these go
        self.box: Box | None = None  # that is in the slabs
        self.turns = False  # whether its rows of cells lie at their number modulo 3

    def load(self, box: Box, first: int, cells: int) -> list[Tensor]:
        """Slabs of keys and values of a box, flat: `[B * heads * cells, X of a cell * rows, channels]`.

        `first`: the cell that the slabs begin with, which may lie before the box as they may end after it.
        """
        z, y, x = box
        height = self.relation.key_cell[1]
        if box == self.box:
            return self.slabs
        if self.turns and self.box == (z, slice(y.start - height, y.stop - height), x):
            self.store(slice(y.start - height, y.start))
            new = slice(y.stop - height, y.stop)
        else:
            self.close()
            new, k = y, self.arrays[0]
            rows = (z.stop - z.start) * (y.stop - y.start)
            shape = (k.shape[0] * k.shape[4] * cells, self.relation.key_cell[2] * rows)
            self.slabs = [k.new_zeros(*shape, k.shape[-1] + extra, dtype=self.dtype) for extra in (1, 0)]
            self.slabs[0][..., -1] = ABSENT
        self.box, self.turns = box, self.keep and y.stop - y.start == 3 * height
        start = x.start - first * self.relation.key_cell[2]
        self.columns = slice(start, start + x.stop - x.start)
        for rows, place in self.places(new):
            self._copy((z, rows, x), place)
        return self.slabs

    def places(self, y: slice) -> list[tuple[slice, slice]]:
        """Where rows of keys lie in the slabs: `(rows of keys, rows of the slab)`."""
        if not self.turns:
            return [(y, slice(0, y.stop - y.start))]
        height = self.relation.key_cell[1]
        starts = range(y.start, y.stop, height)
        return [(slice(i, i + height), slice(i % (3 * height), i % (3 * height) + height)) for i in starts]

    def _copy(self, box: Box, place: slice) -> None:
        for slab, tokens in zip(self.slabs, self.arrays, strict=True):
            target = self.unflat(slab)[:, :, :, :, place, : tokens.shape[5]]
            target.copy_(tokens[(slice(None), *box)].permute(0, 4, 3, 1, 2, 5))
        bias = self.unflat(self.slabs[0])[:, :, :, :, place, -1]
        if self.bias is None:
            bias.zero_()
        else:
            bias.copy_(self.bias[(slice(None), *box)].permute(0, 3, 1, 2)[:, None].expand_as(bias))

    def gradients(self, *targets: Tensor) -> list[Tensor]:
        """Where to add up the gradients of what `load` gave; a row's go to the targets when it is done."""
        if not self.d_slabs:
            self.targets = targets
            self.d_slabs = [
                slab.new_zeros(*slab.shape[:-1], x.shape[-1]) for slab, x in zip(self.slabs, targets, strict=True)
            ]
        return self.d_slabs

    def store(self, y: slice) -> None:
        """Add the gradients of rows of keys to the targets, and begin anew."""
        for target, slab in zip(self.targets, map(self.unflat, self.d_slabs), strict=True):
            for rows, place in self.places(y):
                piece = slab[:, :, :, :, place]
                target[:, self.box[0], rows, self.box[2]] += piece.permute(0, 3, 4, 2, 1, 5)
                piece.zero_()

    def close(self) -> None:
        """Store what is left."""
        if self.d_slabs:
            self.store(self.box[1])
        self.targets, self.d_slabs = (), []

    def unflat(self, slab: Tensor) -> Tensor:
        """`[B, heads, X, Z, Y, channels]` of the box in a flat slab."""
        k, (z, y, _) = self.arrays[0], self.box
        slab = slab.view(k.shape[0], k.shape[4], -1, z.stop - z.start, y.stop - y.start, slab.shape[-1])
        return slab[:, :, self.columns]


class Window:
    """A tile: a row of cells, or a stretch of one; its queries are in `box`, its keys in `key_box`."""

    def __init__(self, q: Tensor, keys: KeyRows, box: Box, key_box: Box, scale: float):
        self.q, self.keys, self.box, self.key_box, self.scale = q, keys, box, key_box, scale
        self.relation, self.dtype = keys.relation, keys.dtype
        self.cell = self.relation.query_cell[2]
        self.first = box[2].start // self.cell - 1
        self.cells = -(-box[2].stop // self.cell) + 1 - self.first
        self.rows = (box[0].stop - box[0].start) * (box[1].stop - box[1].start)
        self.size = 2 + self.relation.after
        self.pattern = None
        if self.relation.far or self.relation.causal:
            self.pattern = self._pattern()

    def _pattern(self) -> Tensor:
        """The relation's pattern for an inner cell, in the order of slabs: X first."""
        x = slice(self.cell, 2 * self.cell)
        key_x = slice(0, self.size * self.relation.key_cell[2])
        pattern = self.relation.pattern((*self.box[:2], x), (*self.key_box[:2], key_x), self.dtype, self.q.device)
        rows, key_rows = self.rows, pattern.shape[1] // key_x.stop
        pattern = pattern.view(rows, self.cell, key_rows, -1).permute(1, 0, 3, 2)
        return pattern.flatten(2).flatten(0, 1)

    def _slab(self, x: Tensor, more: int = 0, outside: float = 0.0) -> Tensor:
        """Queries' values `[B, *box, heads, channels]` as `[B * heads * cells, X of a cell * rows, channels + more]`.

        Positions that are not of the box are `outside`.
        """
        batch, heads, channels = x.shape[0], x.shape[4], x.shape[5]
        slab = x.new_empty(batch, heads, self.cells * self.cell, *x.shape[1:3], channels + more, dtype=self.dtype)
        stop = self.cell + x.shape[3]
        slab[:, :, self.cell : stop, ..., :channels] = x.permute(0, 4, 3, 1, 2, 5)
        slab[:, :, : self.cell] = outside
        slab[:, :, stop:] = outside
        return slab.view(batch * heads * self.cells, -1, channels + more)

    def _give(self, slab: Tensor) -> Tensor:
        """The way back, a view."""
        rows = [s.stop - s.start for s in self.box[:2]]
        x = slab.view(self.q.shape[0], self.q.shape[4], self.cells * self.cell, *rows, -1).permute(0, 3, 4, 2, 1, 5)
        return x[:, :, :, self.cell : self.cell + self.box[2].stop - self.box[2].start]

    def _queries(self) -> Tensor:
        """Scaled, with a 1 for the bias of keys."""
        slab = self._slab(self.q[(slice(None), *self.box)], 1)
        slab[..., :-1] *= self.scale
        slab[..., -1] = 1
        return slab

    def _windows(self, slab: Tensor) -> Tensor:
        """The windows of a slab of keys, those of its second cell first: views that overlap."""
        count, keys, channels = slab.shape
        return slab.as_strided((max(0, count - 2), self.size * keys, channels), (keys * channels, channels, 1))

    def _runs(self, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
        """Runs of cells, and of their windows: of one entry's at a time, or, where that is little, of all together."""
        own, entries = self.cells - 2, self.q.shape[0] * self.q.shape[4]
        if own * queries * keys < PAIRS // 8:
            spans = [range(1, entries * self.cells - 1)]  # the absent cells between entries, too
        else:
            spans = [range(e * self.cells + 1, e * self.cells + 1 + own) for e in range(entries)]
        for span in spans:
            step = -(-len(span) // -(-len(span) * queries * keys // PAIRS)) if span else 1
            for start in span[::step]:
                stop = min(span.stop, start + step)
                yield slice(start, stop), slice(start - 1, stop - 1)

    def _adjust(self, scores: Tensor) -> None:
        if self.pattern is not None:
            scores += self.pattern

    def attend(self) -> tuple[Tensor, Tensor]:
        """Output and lse of these entries, `[B, *box, heads, head_dim]` and `[B, *box, heads]`."""
        q = self._queries()
        k, v = map(self._windows, self.keys.load(self.key_box, self.first, self.cells))
        out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], 1)
        for run, seen in self._runs(q.shape[1], k.shape[1]):
            out[run], lse[run] = attend(q[run], k[seen], v[seen], self._adjust)
        return self._give(out), self._give(lse).squeeze(-1)

    def backward(
        self, lse: Tensor, delta: Tensor, d_out: Tensor, out: Tensor | None, d_k: Tensor, d_v: Tensor
    ) -> Tensor:
        """As `Row.backward`."""
        q = self._queries()
        slabs = self.keys.load(self.key_box, self.first, self.cells)
        k, v = map(self._windows, slabs)
        lse = self._slab(lse[..., None], outside=-ABSENT)  # probabilities of 0 outside the box
        delta, d_out = (self._slab(x) for x in (delta[..., None], d_out))
        channels, keys = d_out.shape[-1], slabs[0].shape[1]
        d_q = q.new_empty(d_out.shape)
        d_slabs = self.keys.gradients(d_k, d_v)
        for run, seen in self._runs(q.shape[1], k.shape[1]):
            weights, d_scores = attend_backward(
                q[run], k[seen], v[seen], self._adjust, lse[run], delta[run], d_out[run]
            )
            torch.bmm(d_scores, k[seen, :, :channels], out=d_q[run])
            # Windows overlap, their parts of one cell do not.
            for part in range(self.size):
                columns, cells = slice(part * keys, (part + 1) * keys), slice(seen.start + part, seen.stop + part)
                d_slabs[0][cells].baddbmm_(d_scores[..., columns].mT, q[run, :, :channels])
                d_slabs[1][cells].baddbmm_(weights[..., columns].mT, d_out[run])
        return self._give(d_q.mul_(self.scale))


def windows(
    arrays: tuple[Tensor, ...], bias: Tensor | None, relation: Relation, scale: float, dtype: torch.dtype
) -> Iterator[Window]:
    """The tiles of q, k and v; together they hold each query once."""
    q, k = arrays[:2]
    extents, key_extents, cell = q.shape[1:4], k.shape[1:4], relation.query_cell
    ordered = relation.far or relation.causal
    length = max(LEAST_CELLS, LENGTH // max(cell[2], relation.key_cell[2])) * cell[2]
    for x in range(0, extents[2], length):
        x = slice(x, min(extents[2], x + length))
        key_x = relation.keys_of(2, x, key_extents[2])
        keys = KeyRows(arrays[1:], bias, relation, dtype, ordered)
        for z in range(0, extents[0], cell[0]):
            z = slice(z, min(extents[0], z + cell[0]))
            key_z = relation.keys_of(0, z, key_extents[0])
            window = (
                (key_z.stop - key_z.start) * (2 + relation.after) ** 2 * relation.key_cell[1] * relation.key_cell[2]
            )
            size = max(1, PAIRS // (window * (z.stop - z.start) * cell[2]))
            size = -(-cell[1] // -(-cell[1] // min(size, cell[1])))
            for start in range(0, extents[1], cell[1]):
                stop = min(extents[1], start + cell[1])
                for first in range(start, stop, size):
                    y = slice(first, min(stop, first + size))
                    key_box = (key_z, relation.keys_of(1, y, key_extents[1]), key_x)
                    yield Window(q, keys, (z, y, x), key_box, scale)
        keys.close()
