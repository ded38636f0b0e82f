"""The aggregation's launches, forward and backward, and the plain way for calls that its kernels leave out.

The kernels take one stack of learned levels with `cell_size` bins, or none, without a mask; the rest, which few calls
ask for, is plain PyTorch and its autograd. Each array element has one writer and there are no atomics: results are
bitwise repeatable.
"""

from math import gcd, prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from ...geometry import cell_side, num_cells, tiling
from ..call import Call, Options
from . import aggregation_kernels as kernels_of
from . import tiles

# What a program takes of a cell at once: columns, and summary tokens; more of the former come in turns.
MAX_COLUMNS = 16
MAX_RANKS = 8
# About as many programs share the sum over all cells that is a kernel's gradient.
PROGRAMS = 1024
# Block sums that the first level makes: of 2 and 4 tokens a side.
MAX_SOURCES = 2


class Kept(NamedTuple):
    """What the backward takes of the forward.

    Attributes:
        lattices: `[kinds, B, entries, heads, head_dim]`, see `indexing`.
        tables, factors, sources: of the kernels; None, None and () from the plain way.
        leaves: of the plain way, whose graph `lattices` holds.
    """

    lattices: Tensor
    tables: Tensor | None = None
    factors: Tensor | None = None
    sources: tuple[Tensor, ...] = ()
    leaves: tuple[Tensor, ...] = ()


class Aggregation:
    """The aggregation of one signature.

    Args:
        signature: of the call.
        levels: coarse levels, at least one.
        entries: summary tokens of all levels.
        dtype: of the lattices; None is float32.
    """

    def __init__(self, signature, levels: int, entries: int, dtype: torch.dtype | None):
        shape, strides, stacks, _, token_dtype, self.device, masked, options = signature
        self.batch, self.heads, *grid, self.head_dim = shape
        self.options, self.levels, self.entries = options, levels, entries
        self.dtype, ndim = dtype or torch.float32, len(grid)
        self.kinds = 3 if options.variant == "linear" else 2
        self.grid = height, width = (1, *grid)[-2:]
        self.is_fused = not masked and _has_kernels(options, stacks, ndim)
        if not self.is_fused:
            return
        bins, rank = options.cell_size, options.rank
        parts = (1, *tiling(rank, ndim))[-2:]
        self.learned = stacks[0][0][0] if stacks else 0
        self.sources = min(gcd(bins, 1 << MAX_SOURCES).bit_length() - 1, levels - 1)
        self.is_cut = any(n % cell_side(levels, bins) for n in grid)
        cells = [prod(num_cells(tuple(grid), cell_side(level, bins))) for level in range(1, levels + 1)]
        units = [(-(-height // (1 << j)) if ndim == 2 else 1, -(-width // (1 << j))) for j in range(self.sources + 1)]
        self._blocks = [(self.kinds, self.batch, *unit, self.heads, self.head_dim) for unit in units]
        block_d, block_p, block_b = (triton.next_power_of_2(n) for n in (self.head_dim, rank, bins))
        pairs = triton.next_power_of_2(-(-min(bins, MAX_COLUMNS) // 2))
        self._table_shape = (levels, self.kinds, ndim, bins, rank, self.heads, self.head_dim)

        own = dict(batch=self.batch, heads=self.heads, height=height, width=width, entries=entries, levels=levels)
        own |= dict(KINDS=self.kinds, HEAD_DIM=self.head_dim, BLOCK_D=block_d, RANK=rank, BLOCK_P=block_p)
        own |= dict(PARTS_Y=parts[0], PARTS_X=parts[1], BINS=bins, BLOCK_B=block_b, NDIM=ndim, PAIRS=pairs)
        own |= dict(SOURCES=self.sources, CUT=self.is_cut, learned=self.learned)
        # Kinds are keys, values, queries.
        of_kinds = [(*s[:-1],) if ndim == 2 else (*s[:2], 0, s[2]) for s in (strides[1], strides[2], strides[0])]
        tokens = dict(zip(("strides0", "strides1", "strides2"), of_kinds, strict=True)) | dict(FIRST=True)
        blocks = dict.fromkeys(("strides0", "strides1", "strides2"), (0, 0, 0, 0)) | dict(FIRST=False)
        per_cell = self.heads * self.kinds

        def launch(kernel, programs, **more) -> tiles.Launch:
            """`programs`: a number, or a function of a tile's cells."""

            def bound(tile: tiles.Tile) -> tuple[int, dict, int]:
                of_tile = max(1, tile.block // (pairs * block_p * block_d))
                count = programs if isinstance(programs, int) else programs(of_tile)
                # What cut cells add to the gradient of a product takes as many registers again.
                warps = 2 if self.is_cut and kernel is kernels_of.product_gradient else tile.num_warps
                return count, own | dict(CELLS=of_tile) | more, warps

            return tiles.Launch(kernel, self.device, self.head_dim, token_dtype, bound)

        def tiles_of(counts):
            return lambda of_tile: per_cell * sum(-(-self.batch * n // of_tile) for n in counts)

        kernel_strides = (0,) * 7
        if stacks:
            kernel_strides = tuple(s if n > 1 else 0 for n, s in zip(*stacks[0][:2], strict=True))
        rows = prod(self._table_shape[:3]) * rank * self.heads
        self._lay_out = launch(kernels_of.lay_out, rows, strides=kernel_strides)
        self._summarise = launch(kernels_of.summarise, tiles_of(cells[:1]), **tokens)
        self._summarise_above = launch(kernels_of.summarise, tiles_of(cells[1:]), **blocks)
        self._source_gradients = [
            launch(kernels_of.source_gradient, tiles_of([cells[j]]), number=j) for j in range(self.sources + 1)
        ]

        # A kernel's gradient: sums over runs of cells, then over runs.
        block_x = triton.next_power_of_2(min(bins, MAX_COLUMNS))
        block = tiles.choice(kernels_of.product_gradient.__name__, self.device, self.head_dim, token_dtype).block
        of_tile = max(1, block // (block_x * block_p * block_d))
        columns = -(-bins // block_x) * (bins if ndim == 2 else 1)
        most = max(1, PROGRAMS // (per_cell * columns))
        self._slots = [_runs(-(-self.batch * n // of_tile), most) for n in cells]
        shared = dict(most=most, CELLS=of_tile, BLOCK_X=block_x)
        programs = [per_cell * columns * n for n in (self._slots[0], sum(self._slots[1:]))]
        self._products = launch(kernels_of.product_gradient, programs[0], **tokens, **shared)
        self._products_above = launch(kernels_of.product_gradient, programs[1], **blocks, **shared)
        rows = self.learned * per_cell * ndim * rank * bins
        self._kernel_gradient = launch(kernels_of.kernel_gradient, rows, **shared)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def forward(self, call: Call, learn: bool = False) -> Kept:
        """The lattices; with `learn` also what `backward` needs."""
        if not self.is_fused:
            return self._plain(call, learn)
        tables = self._numbers(*self._table_shape)
        self._lay_out(call.kernels[0] if call.kernels else None, tables)
        lattice = (self.kinds, self.batch, self.entries, self.heads, self.head_dim)
        lattices = torch.empty(lattice, dtype=self.dtype, device=self.device)
        factors = self._numbers(*lattice) if learn and self.is_cut else None
        sources = tuple(self._numbers(*shape) for shape in self._blocks[1:])
        blocks = (*sources, None, None)[:2]
        x = self._tokens(call)
        self._summarise(*x, tables, lattices, factors, *blocks)
        if self.levels > 1:
            self._summarise_above(*blocks, None, tables, lattices, factors, None, None)
        return Kept(lattices, tables, factors, sources)

    def _tokens(self, call: Call) -> tuple[Tensor | None, ...]:
        return call.k, call.v, call.q if self.kinds == 3 else None

    def backward(self, call: Call, kept: Kept, d_lattices: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of tokens, float32 `[kinds, B, *grid, heads, head_dim]`, and of the kernels."""
        if not self.is_fused:
            return self._plain_backward(call, kept, d_lattices)
        d_blocks = None
        for shape, gradient in zip(reversed(self._blocks), reversed(self._source_gradients), strict=True):
            d_source = self._numbers(*shape)
            gradient(kept.tables, d_lattices, kept.factors, d_blocks, d_source)
            d_blocks = d_source
        if not call.kernels:
            return d_blocks, []
        tables = kept.tables
        partial = self._numbers(sum(self._slots), *tables.shape[1:2], *self._product_shape())
        inputs = (tables, kept.lattices, kept.factors, d_lattices, partial)
        self._products(*self._tokens(call), *inputs)
        if self.levels > 1:
            self._products_above(*(*kept.sources, None)[:2], None, *inputs)
        [stack] = call.kernels
        d_kernels = self._numbers(self.learned, *tables.shape[1:3], *tables.shape[4:], self.options.cell_size)
        self._kernel_gradient(tables, partial, d_kernels)
        return d_blocks, [d_kernels.sum_to_size(stack.shape).to(stack.dtype)]

    def _product_shape(self) -> tuple[int, ...]:
        _, _, ndim, bins, *rest = self._table_shape
        return (bins if ndim == 2 else 1, bins, *rest)

    def _plain(self, call: Call, learn: bool) -> Kept:
        leaves = [call.k, call.v, *([call.q] if self.kinds == 3 else []), *call.kernels]
        with torch.set_grad_enabled(learn):
            if learn:
                leaves = [x.detach().requires_grad_() for x in leaves]
            tokens, stacks = leaves[: self.kinds], leaves[self.kinds :]
            made = [plain(x, stacks, kind, call.key_mask, self.options, self.levels) for kind, x in enumerate(tokens)]
            lattices = torch.stack([torch.cat([x.flatten(1, -3) for x in one], 1) for one in made])
        return Kept(lattices.to(self.dtype), leaves=tuple(leaves))

    def _plain_backward(self, call: Call, kept: Kept, d_lattices: Tensor) -> tuple[Tensor, list[Tensor]]:
        d_lattices = d_lattices.to(self.dtype)
        grads = torch.autograd.grad(
            kept.lattices, kept.leaves, d_lattices, allow_unused=True, materialize_grads=True
        )
        extra = torch.stack([g.movedim(1, -2).float() for g in grads[: self.kinds]])
        return extra, list(grads[self.kinds :])


def _has_kernels(options: Options, stacks: tuple, ndim: int) -> bool:
    """Whether the kernels are made for these stacks of kernels."""
    bins = options.cell_size
    if bins % 2 or options.rank > MAX_RANKS or len(stacks) > 1:
        return False
    if stacks:
        return stacks[0][0][-1] == bins and stacks[0][0][0] > 0
    return not any(bins % p for p in tiling(options.rank, ndim))


def _runs(of_tiles: int, most: int) -> int:
    return -(-of_tiles // -(-of_tiles // most)) if of_tiles else 0


def plain(
    x: Tensor, stacks: list[Tensor], kind: int, key_mask: Tensor | None, options: Options, levels: int
) -> list[Tensor]:
    """The summary tokens of `[B, heads, *grid, head_dim]`, level by level, `[B, *lattice, heads, head_dim]`, float32."""
    x, grid = x.movedim(1, -2), x.shape[2:-1]
    there = torch.ones(1, *grid, device=x.device) if key_mask is None else key_mask.float()
    if key_mask is not None:
        x = torch.where(key_mask[..., None, None], x, 0)
    x, found = x.float(), []
    for level in range(1, levels + 1):
        side, parts = cell_side(level, options.cell_size), tiling(options.rank, len(grid))
        weights = _weights(stacks, level, kind, options.rank, parts, side, x.device)
        ends = [0, 0] * 2 + [n for extent in reversed(grid) for n in (0, -extent % side)]
        cells, full = _by_cell(pad(x, ends), side), side ** len(grid)
        exists = _by_cell(pad(there[..., None, None], ends), side)  # [B, *cells, *offsets, 1, 1]
        sums, left = cells.unsqueeze(-3), exists.unsqueeze(-3)
        whole = 1.0
        for w in reversed(weights):  # [p, heads | 1, head_dim | 1, side]; the last axis of offsets first
            w = w.movedim(-1, 0)
            sums, left = (sums * w).sum(-4), (left * w.abs()).sum(-4)
            whole = whole * w.abs().sum(0)
        share = torch.where(left > 0, sums / torch.where(left > 0, left, 1), 0)
        made = torch.where(exists.sum(list(range(-2 - len(grid), -2))).unsqueeze(-3) == full, sums, share * whole) / full
        made = made.unflatten(-3, parts)  # [B, *cells, *parts, heads, head_dim]
        axes = range(1, len(grid) + 1)
        order = [0, *(a for axis in axes for a in (axis, axis + len(grid))), made.dim() - 2, made.dim() - 1]
        lattice = [n * p for n, p in zip(cells.shape[1 : len(grid) + 1], parts, strict=True)]
        found.append(made.permute(order).reshape(x.shape[0], *lattice, *x.shape[-2:]))
    return found


def _by_cell(x: Tensor, side: int) -> Tensor:
    """`[B, *grid, heads, head_dim]` to `[B, *cells, *offsets, heads, head_dim]`."""
    ndim = x.dim() - 3
    for axis in range(ndim):
        x = x.unflatten(1 + 2 * axis, (-1, side))
    return x.permute(0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2), -2, -1)


def _weights(
    stacks: list[Tensor], level: int, kind: int, rank: int, parts: tuple[int, ...], side: int, device: torch.device
) -> list[Tensor]:
    """A level's kernels by token, an axis each: `[rank, heads | 1, head_dim | 1, side]`, float32 densities."""
    learned = [(stack, i) for stack in stacks for i in range(stack.shape[0])]
    if learned:
        stack, i = learned[min(level, len(learned)) - 1]
        return [w.float().repeat_interleave(side // w.shape[-1], -1) for w in stack[i, kind]]
    index, found = torch.arange(rank, device=device), []
    for p in reversed(parts):
        found.insert(0, overlaps(side, p, device).T[index % p][:, None, None])
        index = index // p
    return found


def overlaps(side: int, parts: int, device: torch.device) -> Tensor:
    """`[side, parts]`: how much of each token of a cell lies in each sub-cell, in units of `1 / parts` tokens.

    Made on the device: a CUDA graph cannot copy from the host.
    """
    token = torch.arange(side, device=device)[:, None] * parts
    part = torch.arange(parts, device=device) * side
    return (torch.minimum(token + parts, part + side) - torch.maximum(token, part)).clamp(min=0).to(torch.float32)


def log_counts(key_mask: Tensor, options: Options, lattices: list[tuple[int, ...]]) -> Tensor:
    """`log2 n` of every summary token under a mask, -inf for none: `[B, entries]`."""
    side, ndim = options.cell_size, key_mask.dim() - 1
    count = key_mask.to(torch.float32)  # tokens of a sub-cell, in units of 1 / rank
    for axis, p in enumerate(tiling(options.rank, ndim), 1):
        cells = pad(count.movedim(axis, -1), (0, -count.shape[axis] % side)).unflatten(-1, (-1, side))
        count = (cells @ overlaps(side, p, key_mask.device)).flatten(-2).movedim(-1, axis)
    counts = [count]
    for extents in lattices[1:]:
        # Sub-cells nest: two of an axis make one of the next level.
        for axis, extent in enumerate(extents, 1):
            count = pad(count.movedim(axis, -1), (0, 2 * extent - count.shape[axis])).unflatten(-1, (-1, 2))
            count = count.sum(-1).movedim(-1, axis)
        counts.append(count)
    count = torch.cat([x.flatten(1) for x in counts], 1)
    if options.count_bias:
        return (count / options.rank).log2()
    return torch.zeros_like(count).masked_fill(count == 0, -torch.inf)
