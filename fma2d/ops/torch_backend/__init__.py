"""The torch backend: plain PyTorch, linear memory, any device.

Levels run from the coarsest down to 0, the near field; each adds its entries to a softmax under way (`State`). In the
linear variant the state lives on summary queries, and what is finer goes on from that of its sub-cell; in the
log-linear variant it lives on the tokens. The way back makes the probabilities of a level again, from the log-sum-exp
of the whole.

Forward and backward run without autograd, inside the `torch.library` op. `forward` itself is made of differentiable
operations, which is how the second derivative is had (`library.py`).
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ...geometry import cell_side, tiling
from ...kernels import log_counts
from ..call import Call
from .aggregation import Aggregation
from .cells import ABSENT, Box, Relation, is_followed
from .rows import Row, rows
from .windows import Window, windows

# Up to this many cells across, tiles are whole rows of cells: windows would be mostly outside the grid.
FEW_CELLS = 5
# Softmaxes are merged in pieces of about this many elements, of at most about so many positions along X.
MERGED, WIDEST = 1 << 19, 1 << 10


class State(NamedTuple):
    """A softmax under way: the result over the entries so far and its lse, `[B, Z, Y, X, heads, channels | none]`."""

    value: Tensor
    lse: Tensor


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out `[B, heads, *grid, head_dim]` in q's dtype, lse `[B, heads, *grid]` in float32 or wider."""
    run = _Run(call, learn=False)
    value, lse = run.attend_down_to(0)[-1]
    out = value.to(call.q.dtype)
    if call.key_mask is not None:
        out, lse = torch.where(run.exists[..., None], out, 0), torch.where(run.exists, lse, -torch.inf)
    return run.grid_of(out).movedim(-2, 1), run.grid_of(lse).movedim(-1, 1)


def backward(
    call: Call, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of (q, k, v) and of the stacks of kernels, zero for levels that the grid does not use."""
    run = _Run(call, learn=True)
    whole = State(run.planes(out.movedim(1, -2)), run.planes(lse.movedim(1, -1)))
    d_whole = State(run.planes(d_out.movedim(1, -2)), None if d_lse is None else run.planes(d_lse.movedim(1, -1)))
    if call.key_mask is not None:
        d_whole = State(*(x if x is None else run.where_exists(x) for x in d_whole))

    d_tokens = [torch.zeros(x.shape, dtype=run.dtype, device=x.device) for x in run.tokens]
    d_lattices = {level: [torch.zeros_like(x) for x in run.inputs[level]] for level in range(1, run.levels + 1)}
    states = run.attend_down_to(1) if call.linear else [None] * (run.levels + 1)
    for level in range(run.levels + 1):
        grads = d_tokens if level == 0 else d_lattices[level]
        if level and not call.linear:
            grads = [d_tokens[0], *grads[1:]]
        d_state = run.backward(level, states[-1], whole, d_whole, grads)
        if call.linear:
            whole, d_whole = states.pop(), d_state

    d_kernels = [torch.zeros_like(stack, dtype=run.dtype) for stack in call.kernels]
    for aggregation, members in run.aggregations:
        own = {n: torch.cat([run.grid_of(d[i]) for i in members], -2) for n, d in d_lattices.items()}
        d_own = aggregation.down(own, [run.grid_of(d_tokens[i]) for i in members])
        for total, d in zip(d_kernels, d_own, strict=True):
            total += d
    if call.key_mask is not None:
        d_tokens = [run.where_exists(d) for d in d_tokens]
    d_tokens = [run.grid_of(d).movedim(-2, 1).to(call.q.dtype) for d in d_tokens]
    return d_tokens, [d.to(w.dtype) for d, w in zip(d_kernels, call.kernels, strict=True)]


class _Run:
    """A call: what each level attends from and to, and how.

    Attributes:
        tokens: q, k and v, `[B, Z, Y, X, heads, head_dim]`, absent ones zero.
        inputs: by level (0: the tokens) queries, keys and values, likewise.
        aggregations: each with the numbers of the tokens that it aggregates (q 0, k 1, v 2).
        learn: whether gradients will be asked for.
    """

    def __init__(self, call: Call, learn: bool):
        options = call.options
        self.call, self.levels, self.parts = call, call.levels, tiling(options.rank, len(call.grid))
        self.dtype = torch.promote_types(call.q.dtype, torch.float32)
        self.tokens = [self.planes(x.movedim(1, -2)) for x in call[:3]]
        if call.key_mask is not None:
            self.exists = self.planes(call.key_mask[..., None])
            self.tokens = [self.where_exists(x) for x in self.tokens]
        self.inputs = [self.tokens]
        self.aggregations = list(self._aggregations(learn)) if self.levels else []
        for level in range(1, self.levels + 1):
            lattices = list(self.tokens)
            for aggregation, members in self.aggregations:
                pieces = self.planes(aggregation.lattices[level]).chunk(len(members), -2)
                for i, lattice in zip(members, pieces, strict=True):
                    lattices[i] = lattice
            self.inputs.append(lattices)

    def planes(self, x: Tensor) -> Tensor:
        """`[B, *grid, ...]` with three grid axes."""
        for _ in range(3 - len(self.call.grid)):
            x = x.unsqueeze(1)
        return x

    def grid_of(self, x: Tensor) -> Tensor:
        """The way back."""
        for _ in range(3 - len(self.call.grid)):
            x = x.squeeze(1)
        return x

    def where_exists(self, x: Tensor) -> Tensor:
        return torch.where(self.exists if x.dim() == 5 else self.exists[..., None], x, 0)

    def _aggregations(self, learn: bool) -> Iterator[tuple[Aggregation, list[int]]]:
        members = [0, 1, 2] if self.call.linear else [1, 2]
        tokens = [self.grid_of(self.tokens[i]) for i in members]
        # What a fused projection gives lies side by side in memory, and is one tensor with more heads.
        first, size = tokens[0], tokens[0].stride(-2) * tokens[0].shape[-2]
        beside = not is_followed() and all(
            x.stride() == first.stride()
            and x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and x.storage_offset() == first.storage_offset() + i * size
            for i, x in enumerate(tokens)
        )
        groups = [members] if beside else [[i] for i in members]
        for group in groups:
            x = self.grid_of(self.tokens[group[0]])
            if len(group) > 1:
                x = x.as_strided((*x.shape[:-2], len(group) * x.shape[-2], x.shape[-1]), x.stride())
            kinds = [(2, 0, 1)[i] for i in group]
            yield Aggregation(self.call, x, kinds, self.dtype, learn), group

    def _axes(self, sizes: int | tuple[int, ...]) -> tuple[int, int, int]:
        """Sizes of the grid's axes, 1 for the others."""
        ndim = len(self.call.grid)
        return (1,) * (3 - ndim) + ((sizes,) * ndim if isinstance(sizes, int) else tuple(sizes))

    def _tiles(self, level: int) -> Iterator[Row | Window]:
        options, grid = self.call.options, self.call.grid
        if level == 0:
            cell = self._axes(options.cell_size)
            relation, bias = Relation(cell, cell, False, options.causal), None
            if self.call.key_mask is not None:
                bias = torch.where(self.call.key_mask, 0, ABSENT).to(self.dtype)
        else:
            key_cell = self._axes([2 * p for p in self.parts])
            cell = key_cell if self.call.linear else self._axes(2 * cell_side(level, options.cell_size))
            relation = Relation(cell, key_cell, True, options.causal)
            settings = (options.cell_size, options.rank, self.call.key_mask, ABSENT, self.dtype, self.call.q.device)
            bias = log_counts(grid, level, *settings)
            if not options.count_bias:
                bias = torch.where(bias > ABSENT / 2, 0, ABSENT).to(self.dtype)
        arrays = self.inputs[level]
        few = -(-arrays[0].shape[3] // cell[2]) <= FEW_CELLS
        bias = None if bias is None else self.planes(bias)
        return (rows if few else windows)(arrays, bias, relation, options.scale, self.dtype)

    def attend_down_to(self, last: int) -> list[State | None]:
        """The states after each level from the coarsest to `last`, after a None for the one before it."""
        states = [None]
        for level in range(self.levels, last - 1, -1):
            states.append(self._attend(level, states[-1]))
            if not self.call.linear:
                states = states[-1:]
        return states

    def _attend(self, level: int, state: State | None) -> State:
        q = self.inputs[level][0]
        value, lse = q.new_empty(q.shape, dtype=self.dtype), q.new_empty(q.shape[:-1], dtype=self.dtype)
        for tile in self._tiles(level):
            box = (slice(None), *tile.box)
            value[box], lse[box] = tile.attend()
        if state is not None:
            for box in self._boxes(value):
                before, lse_before = (self._own(x, level, box) for x in state)
                box = (slice(None), *box)
                own, lse_own = (x[box].clone() if is_followed() else x[box] for x in (value, lse))
                top = torch.maximum(lse_own, lse_before).detach()
                # Not logaddexp: its second derivative is NaN where the two are far apart.
                total = ((lse_own - top).exp() + (lse_before - top).exp()).log() + top
                value[box] = torch.lerp(own, before, (lse_before - total).exp()[..., None])
                lse[box] = total
        return State(value, lse)

    def backward(
        self, level: int, state: State | None, whole: State, d_whole: State, grads: list[Tensor]
    ) -> State | None:
        """Add the gradients of a level's queries, keys and values to `grads`.

        Args:
            state: what the level went on from, of the linear variant.
            whole, d_whole: the softmax that its entries are a part of and the gradients; that of the lse may be None.

        Returns:
            With a state, its gradients.
        """
        # Of a query that sees nothing, probabilities are 0.
        lse = torch.where(whole.lse < ABSENT / 2, -ABSENT, whole.lse)
        delta = torch.empty_like(lse)
        d_state = None if state is None else State(*map(torch.zeros_like, state))
        for box in self._boxes(whole.value):
            own = (slice(None), *box)
            d_out = d_whole.value[own].to(self.dtype)
            delta[own] = (whole.value[own] * d_out).sum(-1)
            if d_whole.lse is not None:
                delta[own] -= d_whole.lse[own]
            if state is not None:
                before, lse_before = (self._own(x, level, box) for x in state)
                weight = (lse_before - lse[own]).exp()
                d_lse = weight * ((d_out * before).sum(-1) - delta[own])
                for total, d in zip(d_state, (weight[..., None] * d_out, d_lse), strict=True):
                    self._add_own(total, d, level, box)
        for tile in self._tiles(level):
            box = (slice(None), *tile.box)
            out = whole.value[box] if d_whole.lse is None else None
            grads[0][box] += tile.backward(lse[box], delta[box], d_whole.value[box], out, *grads[1:])
        return d_state

    def _boxes(self, x: Tensor) -> Iterator[Box]:
        """Pieces of a level's positions."""
        depth, height, width = x.shape[1:4]
        cell = max(2, self.call.options.cell_size)
        wide = cell * max(1, WIDEST // cell)
        step = cell * max(1, MERGED // max(1, cell * x[:, 0, 0, :wide].numel()))
        for start in product(range(0, depth, cell), range(0, height, step), range(0, width, wide)):
            sizes = zip(start, (cell, step, wide), (depth, height, width), strict=True)
            yield tuple(slice(n, min(extent, n + size)) for n, size, extent in sizes)

    def _entries(self, level: int, box: Box) -> Iterator[tuple[Tensor, slice]]:
        """Of each axis of a box, where the coarser level's state has the sub-cells of its positions."""
        sizes = self._axes(2 if level else self.call.options.cell_size)
        parts = self._axes(1 if level else self.parts)
        for span, size, p in zip(box, sizes, parts, strict=True):
            yield _entries(span.start, span.stop, size, p, self.call.q.device)

    def _own(self, x: Tensor, level: int, box: Box) -> Tensor:
        """What the positions of a box go on from."""
        if not self.call.linear:
            return x[(slice(None), *box)]
        entries, spans = zip(*self._entries(level, box), strict=True)
        x = x[(slice(None), *spans)]
        for axis, index in enumerate(entries, 1):
            x = x if len(index) == x.shape[axis] else x.index_select(axis, index)
        return x

    def _add_own(self, total: Tensor, d: Tensor, level: int, box: Box) -> None:
        """The gradient of `_own`: add up what the positions of an entry have."""
        entries, spans = zip(*self._entries(level, box), strict=True)
        for axis, (index, span) in enumerate(zip(entries, spans, strict=True), 1):
            if len(index) != span.stop - span.start:
                own = (torch.arange(span.stop - span.start, device=d.device)[:, None] == index).to(d.dtype)
                shape = d.shape
                d = d.reshape(shape[:axis].numel(), len(index), shape[axis + 1 :].numel())
                d = torch.bmm(own.expand(len(d), -1, -1), d)
                d = d.reshape(*shape[:axis], len(own), *shape[axis + 1 :])
        total[(slice(None), *spans)] += d


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept serves calls of every mode
def _entries(start: int, stop: int, size: int, p: int, device: torch.device) -> tuple[Tensor, slice]:
    """Of positions in cells of `size` that are divided into p: the sub-cells, from the first on, and all of them."""
    entries = [n // size * p + (2 * (n % size) + 1) * p // (2 * size) for n in range(start, stop)]
    return torch.tensor(entries, device=device) - entries[0], slice(entries[0], entries[-1] + 1)
