"""The triton backend: which kernel is launched when, on what.

Forward: summaries of all levels, in the linear variant the attention of the summary queries (`coarse_forward`,
`merge_levels`), then the near field with the far field in it. Backward: lse and delta by cell (`prepare`), the far
field's gradients down to those of the tokens, which the near field's kernels add to theirs as they store them. Nothing
of the far field is kept from forward to backward.

All that follows from sizes, strides, dtypes and options is worked out once a signature and kept in a `Plan`, with the
compiled kernels: a call then allocates its arrays and launches.

Needs one or two grid axes, at least one coarse level, float16, bfloat16 or float32, and a CUDA device or Triton's
interpreter.
"""

from contextlib import nullcontext
from functools import lru_cache
from math import e, log2, prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...geometry import cell_side, num_cells, num_levels, tiling
from ...kernels import log_counts
from .. import torch_backend
from ..call import Call, Options
from . import backward as near_back
from . import backward_far as far_back
from . import forward as ahead
from . import tiles
from .aggregation import Aggregation

# How tensor cores multiply float32. Coarse levels are float32 whatever the tokens are, with the precision of these.
PRECISION = {torch.float32: "tf32x3", torch.float16: "tf32", torch.bfloat16: "tf32"}
# The gradients of a parent's summary keys are summed in at most so many pieces.
MOST_PIECES = 64
# Summary tokens that a tile of queries meets at a time: finding them takes registers.
MOST_COLUMNS = 32
# Signatures whose plans are kept.
MOST_PLANS = 256


class Signature(NamedTuple):
    """What a plan follows from. Strides are those of tokens, alignment to 16 bytes that of q, k, v and the kernels."""

    shape: torch.Size  # of q
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple, ...]  # shape, strides and dtype of each stack
    aligned: tuple[bool, ...]
    dtype: torch.dtype
    device: torch.device
    masked: bool
    options: Options


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out `[B, heads, *grid, head_dim]` in q's dtype, lse `[B, heads, *grid]` in float32."""

    if len(call.q) == 0:  # nothing to launch
        return torch_backend.forward(call)

    def fused() -> tuple[Tensor, Tensor]:
        readable = _readable(call)
        with _on(call.q.device):
            return _plan(_signature(readable)).forward(readable)

    return tiles.run_or(fused, lambda: torch_backend.forward(call))


def backward(
    call: Call, out: Tensor, lse: Tensor, do: Tensor, d_lse: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of (q, k, v) and of the kernels, zero for levels that the grid does not use; d_lse None: zero."""

    if len(call.q) == 0:
        return torch_backend.backward(call, out, lse, do, d_lse)

    def fused() -> tuple[list[Tensor], list[Tensor]]:
        readable = _readable(call)
        with _on(call.q.device):
            return _plan(_signature(readable)).backward(readable, out, lse, do, d_lse)

    return tiles.run_or(fused, lambda: torch_backend.backward(call, out, lse, do, d_lse))


def _readable(call: Call) -> Call:
    """The call with tokens whose channels lie together; copied only where they do not."""
    q, k, v = call[:3]
    if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 or q.shape[-1] == 1:
        return call
    return call._replace(q=_channels_last(q), k=_channels_last(k), v=_channels_last(v))


def _channels_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.movedim(1, -2).contiguous().movedim(-2, 1)


def _on(device: torch.device):
    """Triton launches on the current device."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def _signature(call: Call) -> Signature:
    q, k, v, kernels, key_mask, options = call
    return Signature(
        q.shape,
        (q.stride(), k.stride(), v.stride()),
        tuple((w.shape, w.stride(), w.dtype) for w in kernels),
        tuple(x.data_ptr() % 16 == 0 for x in (q, k, v, *kernels)),
        q.dtype,
        q.device,
        key_mask is not None,
        options,
    )


@lru_cache(MOST_PLANS)
def _plan(signature: Signature) -> "Plan":
    return Plan(signature)


class Plan:
    """Everything of a call but its tensors.

    Attributes:
        extents: of the levels' lattices; `entries` of all together.
        cells, parents: base cells, and parents of all levels.
    """

    def __init__(self, signature: Signature):
        shape, strides, _, _, self.dtype, self.device, self.masked, options = signature
        batch, heads, *grid, head_dim = shape
        self.options, self.ndim = options, len(grid)
        self.linear = options.variant == "linear"
        self.shape = (batch, *grid, heads, head_dim)
        self.levels = num_levels(tuple(grid), options.cell_size)
        height, width = (1, *grid)[-2:]
        parts_y, parts_x = (1, *tiling(options.rank, self.ndim))[-2:]
        sides = [cell_side(level, options.cell_size) for level in range(1, self.levels + 1)]
        self.extents = [(y * parts_y, x * parts_x) for y, x in (num_cells((height, width), s) for s in sides)]
        self.entries = sum(map(prod, self.extents))
        cell = (1, *[options.cell_size] * self.ndim)[-2:]
        parent = (2 * parts_y if self.ndim == 2 else 1, 2 * parts_x)
        self.cells = _count((height, width), cell)
        parents = [_count(extents, parent) for extents in self.extents]
        self.pad = _padded(cell)
        pieces = [min(1 << self.ndim * level, MOST_PIECES) for level in range(self.levels)]
        self.slots = sum(n * p for n, p in zip(parents, pieces, strict=True))
        self.pad_parent = _padded(parent)
        self.aggregation = Aggregation(signature, self.levels, self.entries, None if self.linear else self.dtype)

        scale = options.scale
        own = {f"{name}_strides": _strides(s) for name, s in zip("qkv", strides, strict=True)}
        own |= dict(height=height, width=width, heads=heads, levels=self.levels, entries=self.entries)
        own |= dict(cells=sum(parents), slots=self.slots, cell_size=options.cell_size, scale=scale)
        # exp(scale * q.k) = 2 ** (factor * SIGN * q.k) with factor > 0
        own |= dict(factor=abs(scale) * log2(e) or 1.0, SIGN=(scale > 0) - (scale < 0))
        own |= dict(HEAD_DIM=head_dim, BLOCK_D=max(16, triton.next_power_of_2(head_dim)))
        own |= dict(PARTS_Y=parts_y, PARTS_X=parts_x, NDIM=self.ndim, CAUSAL=options.causal)
        own |= dict(FAR="state" if self.linear else "columns", SUMS=self.linear, COUNT_BIAS=options.count_bias)
        own |= dict(PAD=self.pad, PAD_K=self.pad_parent, MOST=MOST_PIECES, PRECISION=PRECISION[self.dtype])
        own |= dict(SIDE_Y=cell[0], SIDE_X=cell[1], BLOCK_P=max(16, triton.next_power_of_2(options.rank)))
        whole = not self.masked and height % cell[0] == width % cell[1] == 0
        columns = max(16, triton.next_power_of_2((3 if self.ndim == 1 else 27) * options.rank))

        def launch(kernel, count: int, area: tuple[int, int], split: bool = True, **more) -> tiles.Launch:
            """Over `count` areas of these sides for every head; with `split` a program makes one tile of an area."""

            def bound(tile: tiles.Tile) -> tuple[int, dict, int]:
                block = min(tile.block, _block(area))
                step = min(tile.step or tile.block, _block(cell))
                even = whole and prod(cell) % step == prod(cell) % block == 0
                sizes = dict(CELL_Y=area[0], CELL_X=area[1], BLOCK=block, FAR_BLOCK=min(step, columns, MOST_COLUMNS))
                by_keys = kernel in (near_back.near_dkdv, far_back.column_dkdv)
                sizes |= dict(BLOCK_N=block, BLOCK_M=step) if by_keys else dict(BLOCK_M=block, BLOCK_N=step)
                programs = batch * heads * count * (-(-prod(area) // block) if split else 1)
                warps = max(1, tile.num_warps * block // tile.block)
                return programs, own | sizes | dict(EVEN=even) | more, warps

            return tiles.Launch(kernel, self.device, head_dim, self.dtype, bound)

        # Launches are compiled when first made: that a plan has them all costs next to nothing.
        first = dict(entries=prod(self.extents[0])) if self.linear else {}
        self._near_forward = launch(ahead.near_forward, self.cells, cell, **first)
        self._prepare = launch(near_back.prepare, self.cells, cell, split=False)
        self._near_dq = launch(near_back.near_dq, self.cells, cell)
        self._near_dkdv = launch(near_back.near_dkdv, self.cells, cell)
        self._coarse_forward = launch(ahead.coarse_forward, sum(parents), parent)
        self._merge_levels = launch(ahead.merge_levels, 1, (1, prod(self.extents[0])))
        self._coarse_dq = launch(far_back.coarse_dq, sum(parents), parent)
        self._coarse_dkdv = launch(far_back.coarse_dkdv, sum(parents), parent)
        self._column_dkdv = launch(far_back.column_dkdv, self.slots, parent)
        self._column_sum = launch(far_back.column_sum, sum(parents), parent)

        def collected(tile: tiles.Tile) -> tuple[int, dict, int]:
            held = [1 << self.ndim * level for level in range(self.levels)]
            entries = zip(map(prod, self.extents), held, strict=True)
            most = far_back.MOST_IN_TURN.value
            groups = sum(n if below > most else -(-n // tile.block) for n, below in entries)
            return batch * heads * groups, own | dict(cells=groups, BLOCK=tile.block), tile.num_warps

        self._collect = tiles.Launch(far_back.collect, self.device, head_dim, self.dtype, collected)

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        mask, bias = self._mask(call)
        lattices = self.aggregation.forward(call).lattices
        far_k, far_v, *far_q = lattices.unbind(0)
        far_lse = None
        if self.linear:
            entries = prod(self.extents[0])
            found, found_lse = self._coarse(far_q[0], far_k, far_v, bias)
            far_v, far_lse = self._lattice(entries)
            self._merge_levels(found, found_lse, far_v, far_lse)
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        lse = self._numbers(*self.shape[:-1])
        q, k, v = call[:3]
        self._near_forward(q, k, v, mask, far_k, far_v, far_lse, bias, out, lse)
        return out.movedim(-2, 1), lse.movedim(-1, 1)

    def backward(
        self, call: Call, out: Tensor, lse: Tensor, do: Tensor, d_lse: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        q, k, v = call[:3]
        mask, bias = self._mask(call)
        kept = self.aggregation.forward(call, learn=True)
        far_k, far_v, *far_q = kept.lattices.unbind(0)
        out, do = _aligned(out.movedim(1, -2)), _aligned(do.movedim(1, -2))
        lse = _aligned(lse.movedim(1, -1))
        d_lse = None if d_lse is None else _aligned(d_lse.movedim(1, -1))
        by_cell = (self.shape[0], self.shape[-2], self.cells, self.pad)
        cell_lse, delta = self._numbers(*by_cell), self._numbers(*by_cell)
        d_lattices = self._numbers(*kept.lattices.shape)
        if self.linear:
            d_state, state_lse = self._lattice(prod(self.extents[0]))
            state_delta = torch.empty_like(state_lse)
            self._prepare(out, do, lse, d_lse, mask, cell_lse, delta, state_lse, d_state, state_delta)
            _, far_lse = self._coarse(far_q[0], far_k, far_v, bias)
            d_far, far_delta = self._lattice(self.entries)
            self._collect(state_lse, d_state, state_delta, far_lse, d_far, far_delta)
            asked = (far_q[0], far_k, far_v, bias, d_far, far_lse, far_delta)
            self._coarse_dq(*asked, d_lattices[2])
            self._coarse_dkdv(*asked, d_lattices[0], d_lattices[1])
        else:
            self._prepare(out, do, lse, d_lse, mask, cell_lse, delta, None, None, None)
            pieces = (self.shape[0], self.shape[-2], self.slots, self.pad_parent, self.shape[-1])
            partial_k, partial_v = self._numbers(*pieces), self._numbers(*pieces)
            self._column_dkdv(q, mask, far_k, far_v, bias, do, cell_lse, delta, partial_k, partial_v)
            self._column_sum(partial_k, partial_v, d_lattices[0], d_lattices[1])
        extra, d_kernels = self.aggregation.backward(call, kept, d_lattices)
        dq, dk, dv = (torch.empty(self.shape, dtype=self.dtype, device=self.device) for _ in range(3))
        extra_k, extra_v, *extra_q = extra.unbind(0)
        extra_q = extra_q[0] if extra_q else None
        self._near_dq(q, k, v, mask, far_k, far_v, bias, do, cell_lse, delta, extra_q, dq)
        self._near_dkdv(q, k, v, mask, do, cell_lse, delta, extra_k, extra_v, dk, dv)
        return [x.movedim(-2, 1) for x in (dq, dk, dv)], d_kernels

    def _coarse(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """The attention of the summary queries of every level, not merged."""
        out, lse = self._lattice(self.entries)
        self._coarse_forward(q, k, v, bias, out, lse)
        return out, lse

    def _mask(self, call: Call) -> tuple[Tensor | None, Tensor | None]:
        """The mask as kernels read it, and `log2 n` of the summary tokens under it; None without one."""
        if call.key_mask is None:
            return None, None
        size, rank, mask = self.options.cell_size, self.options.rank, call.key_mask
        found = [
            log_counts(call.grid, level, size, rank, mask, -torch.inf, torch.float32, self.device).flatten(1)
            for level in range(1, self.levels + 1)
        ]
        bias = torch.cat(found, 1)
        bias = bias * log2(e) if self.options.count_bias else torch.where(bias > -torch.inf, 0, bias)
        return _aligned(mask).view(torch.uint8), bias

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def _lattice(self, entries: int) -> tuple[Tensor, Tensor]:
        """An array of summary tokens and one of a number each."""
        shape = (self.shape[0], entries, *self.shape[-2:])
        return self._numbers(*shape), self._numbers(*shape[:-1])


def _count(extents: tuple[int, int], cell: tuple[int, int]) -> int:
    """Cells of these sides, cut ones included."""
    return prod(-(-n // c) for n, c in zip(extents, cell, strict=True))


def _strides(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Of (batch, head, row, column), given those of `[B, heads, *grid, head_dim]`."""
    return strides[:-1] if len(strides) == 5 else (*strides[:2], 0, strides[2])


def _aligned(x: Tensor) -> Tensor:
    """Contiguous, and where a plan expects it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _block(cell: tuple[int, int]) -> int:
    """Rows of the largest tile of a cell."""
    return min(64, max(16, triton.next_power_of_2(prod(cell))))


def _padded(cell: tuple[int, int]) -> int:
    """Positions of a cell, padded to tiles."""
    return -(-prod(cell) // _block(cell)) * _block(cell)
