"""The triton backend: which kernel is launched when, on what.

Forward: summaries of all levels, in the linear variant the attention of the summary queries (`coarse_forward`,
`merge_levels`), then the near field with the far field in it. Backward: lse and delta by cell (`prepare`), the far
field's gradients down to those of the tokens, which the near field's kernels add to theirs as they store them. Nothing
of the far field is kept from forward to backward.

Needs one or two grid axes, float16, bfloat16 or float32, and a CUDA device or Triton's interpreter.
"""

from contextlib import nullcontext
from math import e, log2, prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ..geometry import cell_side, num_cells, num_levels, tiling
from . import blocked, tiles, triton_backward, triton_backward_far, triton_forward
from .options import Call, Kernels
from .triton_aggregation import Summaries, overlaps

# How tensor cores multiply float32. Coarse levels are float32 whatever the tokens are, with the precision of these.
PRECISION = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "tf32"}
# Without coarse levels, a grid is cut into cells like these, and each sees all others.
WHOLE_GRID_CELL = {1: (1, 64), 2: (8, 8)}
# The gradients of a parent's summary keys are summed in at most so many pieces.
MOST_PIECES = 64
# Summary tokens that a tile of queries meets at a time: finding them takes registers.
MOST_COLUMNS = 32


class Lattices(NamedTuple):
    """Summary tokens of all levels, packed as `triton_geometry` says; None without coarse levels."""

    q: Tensor | None = None  # None in the log-linear variant
    k: Tensor | None = None
    v: Tensor | None = None


class Queries(NamedTuple):
    """What the gradients of keys and values take of the queries.

    Attributes:
        d_out: `[B, *grid, heads, head_dim]`.
        lse, delta: by cell.
        state: linear variant, `(state_lse, d_state, state_delta)` of `prepare`.
    """

    d_out: Tensor
    lse: Tensor
    delta: Tensor
    state: tuple[Tensor, Tensor, Tensor] | None


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out `[B, heads, *grid, head_dim]` in q's dtype, lse `[B, heads, *grid]` in float32."""

    def fused() -> tuple[Tensor, Tensor]:
        run = _Run(call)
        out, lse = run.near_forward(run.summarise())
        return out.movedim(-2, 1), lse.movedim(-1, 1)

    return tiles.run_or(fused, lambda: blocked.forward(call))


def backward(call: Call, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> tuple[list[Tensor], list[Kernels]]:
    """Gradients of (q, k, v) and of the (key, value, query) kernels, zero for levels that the grid does not use."""

    def fused() -> tuple[list[Tensor], list[Kernels]]:
        run = _Run(call)
        lattices = run.summarise(learn=True)
        queries = run.prepare(out, d_out, lse, d_lse)
        extra, d_kernels = run.summarise_backward(run.far_backward(lattices, queries))
        d_tokens = [run.near_dq(lattices, queries, extra[0]), *run.near_dkdv(queries, *extra[1:])]
        return [d.movedim(-2, 1) for d in d_tokens], d_kernels

    return tiles.run_or(fused, lambda: blocked.backward(call, out, lse, d_out, d_lse))


class _Run:
    """A call: its sizes, the arguments of its kernels by name, and a method for each step.

    Attributes:
        far: how the far field enters the near one: "none", "state" (linear) or "columns" (log-linear).
        extents: of the levels' lattices.
        arguments: what kernels take by name; a launch adds its own.
    """

    def __init__(self, call: Call):
        *tokens, key_kernels, value_kernels, query_kernels, key_mask, options = call
        q, k, v = map(_channels_last, tokens)
        batch, heads, *grid, head_dim = q.shape
        self.options, self.key_mask, self.grid = options, key_mask, tuple(grid)
        self.dtype, self.device, self.ndim = q.dtype, q.device, len(grid)
        self.shape = (batch, *grid, heads, head_dim)
        self.levels = num_levels(self.grid, options.cell_size) if batch else 0
        self.far = "none" if self.levels == 0 else "columns" if query_kernels is None else "state"
        self.summarised = [k, v] if query_kernels is None else [q, k, v]
        self.kernels = [query_kernels, key_kernels, value_kernels][-len(self.summarised) :]

        height, width = (1, *grid)[-2:]
        self.parts = parts_y, parts_x = (1, *tiling(options.rank, self.ndim))[-2:]
        sides = [cell_side(level, options.cell_size) for level in range(1, self.levels + 1)]
        cells = [num_cells((height, width), side) for side in sides]
        self.extents = [(y * parts_y, x * parts_x) for y, x in cells]
        self.entries = sum(map(prod, self.extents))
        self.cell = (1, *[options.cell_size] * self.ndim)[-2:] if self.levels else WHOLE_GRID_CELL[self.ndim]
        self.parent = (2 * parts_y if self.ndim == 2 else 1, 2 * parts_x)
        self.cells = prod(-(-n // c) for n, c in zip((height, width), self.cell, strict=True))
        self.parents = [prod(-(-n // c) for n, c in zip(extents, self.parent, strict=True)) for extents in self.extents]

        tokens = [x.unsqueeze(2) if self.ndim == 1 else x for x in (q, k, v)]
        scale = options.scale
        self.arguments = {
            **dict(zip(("q", "k", "v"), tokens, strict=True)),
            **{f"{name}_strides": x.stride()[:-1] for name, x in zip("qkv", tokens, strict=True)},
            "mask": None if key_mask is None else key_mask.contiguous().view(torch.uint8),
            "bias": self._bias() if self.levels and key_mask is not None else None,
            **dict(height=height, width=width, heads=heads, levels=self.levels, entries=self.entries),
            **dict(cells=sum(self.parents), cell_size=options.cell_size, scale=scale),
            # exp(scale * q.k) = 2 ** (factor * sign * q.k) with factor > 0
            **dict(factor=abs(scale) * log2(e) or 1.0, sign=float((scale > 0) - (scale < 0))),
            **dict(HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim))),
            **dict(PARTS_Y=parts_y, PARTS_X=parts_x, NDIM=self.ndim, CAUSAL=options.causal),
            **dict(FAR=self.far, WHOLE=self.levels == 0, SUMS=self.far == "state", COUNT_BIAS=options.count_bias),
            **dict(PAD=_padded(self.cell), PAD_K=_padded(self.parent), MOST=MOST_PIECES, PRECISION=PRECISION[q.dtype]),
            **dict(SIDE_Y=self.cell[0], SIDE_X=self.cell[1]),
            **dict(BLOCK_P=max(16, triton.next_power_of_2(options.rank))),
        }

    def _bias(self) -> Tensor:
        """`log2 n` of every summary token under the mask, -inf for none: `[B, entries]`.

        Made on the device without copies from the host, which a CUDA graph cannot hold.
        """
        parts, side = self.parts[-self.ndim :], self.options.cell_size
        count = self.key_mask.to(torch.float32)  # tokens of a sub-cell, in units of 1 / rank
        for axis, p in enumerate(parts, 1):
            shares = overlaps(side, p, self.device)
            cells = pad(count.movedim(axis, -1), (0, -count.shape[axis] % side)).unflatten(-1, (-1, side))
            count = (cells @ shares).flatten(-2).movedim(-1, axis)
        counts = [count]
        for extents in self.extents[1:]:
            # Sub-cells nest: two of an axis make one of the next level.
            for axis, extent in enumerate(extents[-self.ndim :], 1):
                count = pad(count.movedim(axis, -1), (0, 2 * extent - count.shape[axis])).unflatten(-1, (-1, 2))
                count = count.sum(-1).movedim(-1, axis)
            counts.append(count)
        count = torch.cat([x.flatten(1) for x in counts], 1)
        if self.options.count_bias:
            return (count / self.options.rank).log2()
        return torch.zeros_like(count).masked_fill(count == 0, -torch.inf)

    def _launch(self, kernel, count: int, cell: tuple[int, int], split: bool = True, **arguments) -> None:
        """Run a kernel over `count` cells of these sides for every head; its arguments are found by name.

        Args:
            split: a program makes one tile of a cell; else it makes a whole cell.
        """
        rows = self.shape[0] * self.shape[-2] * count

        def run(tile: tiles.Tile) -> None:
            block = min(tile.block, _block(cell))
            columns = max(16, triton.next_power_of_2((3 if self.ndim == 1 else 27) * self.options.rank))
            step = tile.step or tile.block
            sides = dict(CELL_Y=cell[0], CELL_X=cell[1], BLOCK=block)
            steps = dict(STEP=min(step, _block(self.cell)), FAR_BLOCK=min(step, columns, MOST_COLUMNS))
            known = self.arguments | sides | steps | arguments
            kernel[(rows * (-(-prod(cell) // block) if split else 1),)](
                **{name: known[name] for name in kernel.arg_names},
                num_warps=max(1, tile.num_warps * block // tile.block),
                num_stages=tile.num_stages,
            )

        if rows:
            with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
                tiles.launch(kernel.__name__, self.device, self.shape[-1], self.dtype, run)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _lattice(self, entries: int) -> tuple[Tensor, Tensor]:
        """An array of summary tokens and one of a number each."""
        shape = (self.shape[0], entries, *self.shape[-2:])
        return self._numbers(*shape), self._numbers(*shape[:-1])

    def summarise(self, learn: bool = False) -> Lattices:
        """With `learn`, what `summarise_backward` needs is kept."""
        self.summaries = Summaries(self.summarised, self.kernels, self.key_mask, self.options, self.levels, learn)
        if self.levels == 0:
            return Lattices()
        dtype = self.dtype if self.far == "columns" else torch.float32
        packed = [torch.cat([x.flatten(1, -3).to(dtype) for x in levels], 1) for levels in self.summaries.lattices]
        return Lattices(*[None] * (3 - len(packed)), *packed)

    def summarise_backward(self, d_lattices: Lattices) -> tuple[list[Tensor | None], list[Kernels]]:
        """Gradients of (q, k, v) by way of the lattices, float32 or None, and of the (key, value, query) kernels."""
        d_levels, extra = [[] for _ in self.summarised], []
        if self.levels:
            for levels, packed in zip(d_levels, d_lattices[-len(d_levels) :], strict=True):
                pieces = packed.split([prod(x) for x in self.extents], 1)
                extents = [x[-self.ndim :] for x in self.extents]
                levels.extend(d.unflatten(1, x) for d, x in zip(pieces, extents, strict=True))
            extra = [self._numbers(*self.shape) for _ in self.summarised]
        grads = self.summaries.backward(d_levels, extra)
        keys_values, queries = grads[-2:], grads[:-2]
        return [None] * (3 - len(extra)) + extra, [*keys_values, *(queries or [[]])]

    def near_forward(self, lattices: Lattices) -> tuple[Tensor, Tensor]:
        """`(out, lse)`: `[B, *grid, heads, head_dim]`, `[B, *grid, heads]`."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        lse = self._numbers(*self.shape[:-1])
        far = dict(far_k=lattices.k, far_v=lattices.v, far_lse=None)
        if self.far == "state":
            far = dict(far_k=None, **self._merged(lattices), entries=prod(self.extents[0]))
        self._launch(triton_forward.near_forward, self.cells, self.cell, out=out, lse=lse, **far)
        return out, lse

    def _merged(self, lattices: Lattices) -> dict[str, Tensor]:
        """The far field of the summary queries of level 1."""
        far, far_lse = self._coarse_forward(lattices)
        out, lse = self._lattice(prod(self.extents[0]))
        cell = (1, prod(self.extents[0]))
        self._launch(triton_forward.merge_levels, 1, cell, far=far, far_lse=far_lse, out=out, lse=lse)
        return dict(far_v=out, far_lse=lse)

    def _coarse_forward(self, lattices: Lattices) -> tuple[Tensor, Tensor]:
        out, lse = self._lattice(self.entries)
        self._launch(
            triton_forward.coarse_forward, sum(self.parents), self.parent, **lattices._asdict(), out=out, lse=lse
        )
        return out, lse

    def prepare(self, out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor) -> Queries:
        out, d_out = (x.movedim(1, -2).contiguous() for x in (out, d_out))
        lse, d_lse = (x.movedim(1, -1).contiguous() for x in (lse, d_lse))
        pad = self.arguments["PAD"]
        lse_by_cell, delta_by_cell = (self._numbers(self.shape[0], self.shape[-2], self.cells, pad) for _ in range(2))
        state_lse = d_state = state_delta = None
        if self.far == "state":
            d_state, state_lse = self._lattice(prod(self.extents[0]))
            state_delta = torch.empty_like(state_lse)
        self._launch(
            triton_backward.prepare, self.cells, self.cell, split=False,
            out=out, d_out=d_out, lse=lse, d_lse=d_lse, lse_by_cell=lse_by_cell, delta_by_cell=delta_by_cell,
            state_lse=state_lse, d_state=d_state, state_delta=state_delta,
        )  # fmt: skip
        return Queries(d_out, lse_by_cell, delta_by_cell, (state_lse, d_state, state_delta))

    def far_backward(self, lattices: Lattices, queries: Queries) -> Lattices:
        """Gradients of the lattices."""
        if self.far == "none":
            return Lattices()
        d_k, d_v = self._lattice(self.entries)[0], self._lattice(self.entries)[0]
        if self.far == "columns":
            self._column_backward(lattices, queries, d_k, d_v)
            return Lattices(None, d_k, d_v)
        d_q, d_out = self._lattice(self.entries)[0], self._lattice(self.entries)[0]
        _, lse = self._coarse_forward(lattices)
        delta = torch.empty_like(lse)
        state = dict(zip(("state_lse", "d_state", "state_delta"), queries.state, strict=True))
        state |= dict(far_lse=lse, d_out=d_out, delta=delta)
        self._launch(triton_backward_far.collect, self.entries, (1, 32), split=False, **state)
        coarse = lattices._asdict() | dict(d_out=d_out, lse=lse, delta=delta)
        self._launch(triton_backward_far.coarse_dq, sum(self.parents), self.parent, **coarse, d_q=d_q)
        self._launch(triton_backward_far.coarse_dkdv, sum(self.parents), self.parent, **coarse, d_k=d_k, d_v=d_v)
        return Lattices(d_q, d_k, d_v)

    def _column_backward(self, lattices: Lattices, queries: Queries, d_k: Tensor, d_v: Tensor) -> None:
        pieces = [min(1 << self.ndim * level, MOST_PIECES) for level in range(self.levels)]
        slots = sum(n * p for n, p in zip(self.parents, pieces, strict=True))
        shape = (self.shape[0], self.shape[-2], slots, self.arguments["PAD_K"], self.shape[-1])
        partial = dict(partial_k=self._numbers(*shape), partial_v=self._numbers(*shape), slots=slots)
        self._launch(
            triton_backward_far.column_dkdv, slots, self.parent, **partial,
            k=lattices.k, v=lattices.v, d_out=queries.d_out, lse=queries.lse, delta=queries.delta,
        )  # fmt: skip
        self._launch(triton_backward_far.column_sum, sum(self.parents), self.parent, **partial, d_k=d_k, d_v=d_v)

    def near_dq(self, lattices: Lattices, queries: Queries, extra: Tensor | None) -> Tensor:
        """`[B, *grid, heads, head_dim]` in q's dtype; `extra` is added."""
        d_q = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self._launch(
            triton_backward.near_dq, self.cells, self.cell, far_k=lattices.k, far_v=lattices.v,
            d_out=queries.d_out, lse=queries.lse, delta=queries.delta, extra=extra, d_q=d_q,
        )  # fmt: skip
        return d_q

    def near_dkdv(self, queries: Queries, extra_k: Tensor | None, extra_v: Tensor | None) -> tuple[Tensor, Tensor]:
        d_k, d_v = (torch.empty(self.shape, dtype=self.dtype, device=self.device) for _ in range(2))
        self._launch(
            triton_backward.near_dkdv, self.cells, self.cell,
            d_out=queries.d_out, lse=queries.lse, delta=queries.delta,
            extra_k=extra_k, extra_v=extra_v, d_k=d_k, d_v=d_v,
        )  # fmt: skip
        return d_k, d_v


def _block(cell: tuple[int, int]) -> int:
    """Rows of the largest tile of a cell."""
    return min(64, max(16, triton.next_power_of_2(prod(cell))))


def _padded(cell: tuple[int, int]) -> int:
    """Positions of a cell, padded to tiles."""
    return -(-prod(cell) // _block(cell)) * _block(cell)


def _channels_last(x: Tensor) -> Tensor:
    """Itself if its channels lie together; else a copy of `[B, heads, *grid, head_dim]` in which they do."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.movedim(1, -2).contiguous().movedim(-2, 1)
