"""The aggregation's launches, forward and backward, and where the torch backend's takes their place.

The kernels take one stack of learned levels with `cell_size` bins, or none, even cells and no mask; the rest, which few
calls ask for, is left to the torch backend's aggregation. Each array element has one writer and there are no atomics:
results are bitwise repeatable.
"""

from math import gcd, prod
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...geometry import cell_side, num_cells, tiling
from ..call import Call, Options
from ..torch_backend import aggregation as torch_aggregation
from . import aggregation_backward as back
from . import aggregation_kernels as up
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
        tables, factors, sources: of the kernels.
        made: by the torch backend, a kind each.
    """

    lattices: Tensor
    tables: Tensor | None = None
    factors: Tensor | None = None
    sources: tuple[Tensor, ...] = ()
    made: tuple[torch_aggregation.Aggregation, ...] = ()


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
                warps = 2 if self.is_cut and kernel is back.product_gradient else tile.num_warps
                return count, own | dict(CELLS=of_tile) | more, warps

            return tiles.Launch(kernel, self.device, self.head_dim, token_dtype, bound)

        def tiles_of(counts):
            return lambda of_tile: per_cell * sum(-(-self.batch * n // of_tile) for n in counts)

        kernel_strides = (0,) * 7
        if stacks:
            kernel_strides = tuple(s if n > 1 else 0 for n, s in zip(*stacks[0][:2], strict=True))
        rows = prod(self._table_shape[:3]) * rank * self.heads
        self._lay_out = launch(up.lay_out, rows, strides=kernel_strides)
        self._summarise = launch(up.summarise, tiles_of(cells[:1]), **tokens)
        self._summarise_above = launch(up.summarise, tiles_of(cells[1:]), **blocks)
        self._source_gradients = [
            launch(back.source_gradient, tiles_of([cells[j]]), number=j) for j in range(self.sources + 1)
        ]

        # A kernel's gradient: sums over runs of cells, then over runs.
        block_x = triton.next_power_of_2(min(bins, MAX_COLUMNS))
        block = tiles.choice(back.product_gradient.__name__, self.device, self.head_dim, token_dtype).block
        of_tile = max(1, block // (block_x * block_p * block_d))
        columns = -(-bins // block_x) * (bins if ndim == 2 else 1)
        most = max(1, PROGRAMS // (per_cell * columns))
        self._slots = [_runs(-(-self.batch * n // of_tile), most) for n in cells]
        shared = dict(most=most, CELLS=of_tile, BLOCK_X=block_x)
        programs = [per_cell * columns * n for n in (self._slots[0], sum(self._slots[1:]))]
        self._products = launch(back.product_gradient, programs[0], **tokens, **shared)
        self._products_above = launch(back.product_gradient, programs[1], **blocks, **shared)
        rows = self.learned * per_cell * ndim * rank * bins
        self._kernel_gradient = launch(back.kernel_gradient, rows, **shared)

    def _numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def forward(self, call: Call, learn: bool = False) -> Kept:
        """The lattices; with `learn` also what `backward` needs."""
        if not self.is_fused:
            return self._by_torch(call)
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
            return self._back_by_torch(call, kept, d_lattices)
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

    def _by_torch(self, call: Call) -> Kept:
        """The torch backend's, a kind at a time."""
        tokens = [x.movedim(1, -2) for x in self._tokens(call)[: self.kinds]]
        if call.key_mask is not None:
            tokens = [torch.where(call.key_mask[..., None, None], x, 0) for x in tokens]
        made = tuple(
            torch_aggregation.Aggregation(call, x, [kind], torch.float32, learn=True) for kind, x in enumerate(tokens)
        )
        levels = [[of_kind.lattices[n].flatten(1, -3) for n in range(1, self.levels + 1)] for of_kind in made]
        return Kept(torch.stack([torch.cat(x, 1) for x in levels]).to(self.dtype), made=made)

    def _back_by_torch(self, call: Call, kept: Kept, d_lattices: Tensor) -> tuple[Tensor, list[Tensor]]:
        extra = torch.zeros(self.kinds, self.batch, *call.grid, self.heads, self.head_dim, device=self.device)
        d_kernels = [torch.zeros_like(stack, dtype=torch.float32) for stack in call.kernels]
        for of_kind, d_packed, d_tokens in zip(kept.made, d_lattices, extra, strict=True):
            shapes = [x.shape for x in of_kind.lattices.values()]
            pieces = d_packed.split([shape[1:-2].numel() for shape in shapes], 1)
            d_levels = {
                n: d.unflatten(1, shape[1:-2]) for n, (d, shape) in enumerate(zip(pieces, shapes, strict=True), 1)
            }
            for total, d in zip(d_kernels, of_kind.down(d_levels, [d_tokens]), strict=True):
                total += d
        return extra, [d.to(stack.dtype) for d, stack in zip(d_kernels, call.kernels, strict=True)]


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
