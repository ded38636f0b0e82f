"""The aggregation with Triton: all levels from one pass over the tokens, and the way back.

The first level reads the tokens and writes, beside its summary tokens, sums over blocks of 2 x 2 tokens; the second
reads those, and so on upwards: with `cell_size` bins, a level's kernels are constant in its blocks. A level whose
kernels have other bins, or whose cells have an odd side, reads the largest blocks at hand that its bins are made of, if
need be the tokens. What `fma2d/aggregation.py` says of layouts and of cut cells holds here too. Each array element has
one writer and there are no atomics: results are bitwise repeatable.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import gcd, prod

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from ..geometry import cell_side, tiling
from . import tiles
from .options import Kernels, Options
from .triton_aggregation_kernels import source_gradient_kernel, summarise_kernel, weight_gradient_kernel

# What a program takes of a cell at once: columns, and summary tokens; more of them come in turns.
MAX_COLUMNS = 16
MAX_RANKS = 8
# About as many programs share the sum over all cells that is a kernel's gradient.
PROGRAMS = 1024
# Strides are passed in units of their common divisor up to this; 16 bytes are the most that is loaded at once.
MAX_ALIGNMENT = 16


class Summaries:
    """Summary tokens of up to three token arrays at the levels 1 to `levels`, made at once.

    Args:
        tokens: one to three arrays `[B, heads, *grid, head_dim]` of one shape, dtype (not float64) and device, one or
            two grid axes, any strides; those strided alike are read in one launch.
        kernels: for each array a list over learned levels of lists over axes of `[p, heads | 1, head_dim | 1, b]`; `[]`
            is the start value.
        key_mask: bool `[B, *grid]`, True where a token exists; the others are not read.
        learn: keep what `backward` needs.

    Attributes:
        lattices: for each array a list over levels of `[B, *lattice, heads, head_dim]`, contiguous, float32.
    """

    def __init__(
        self,
        tokens: list[Tensor],
        kernels: list[Kernels],
        key_mask: Tensor | None,
        options: Options,
        levels: int,
        learn: bool = False,
    ):
        self._kernels = kernels
        self._passes: list[tuple[list[int], _Pass]] = []
        self.lattices: list[list[Tensor]] = [[] for _ in tokens]
        if levels == 0:
            return
        for group in _strided_alike(tokens):
            made = _Pass([tokens[i] for i in group], [kernels[i] for i in group], key_mask, options, levels, learn)
            self._passes.append((group, made))
            for n, i in enumerate(group):
                lattices = [level.summaries[n] for level in made.levels]
                self.lattices[i] = [x.squeeze(1) for x in lattices] if made.ndim == 1 else lattices

    def backward(self, d_lattices: list[list[Tensor]], d_tokens: list[Tensor]) -> list[Kernels]:
        """Gradients from those of the lattices, once.

        Args:
            d_lattices: like `lattices`.
            d_tokens: float32 `[B, *grid, heads, head_dim]`, contiguous: where the gradients of the tokens go; whatever
                they held is overwritten. Without a level they are left alone.

        Returns:
            Gradients of the kernels, in their dtypes; zero for levels that the grid does not use.
        """
        grads = [[[torch.zeros_like(w, dtype=torch.float32) for w in axes] for axes in one] for one in self._kernels]
        for group, made in self._passes:
            made.backward(*[[x[i] for i in group] for x in (d_lattices, d_tokens, grads)])
        pairs = (zip(d, learned, strict=True) for d, learned in zip(grads, self._kernels, strict=True))
        return [[[d.to(w.dtype) for d, w in zip(*axes, strict=True)] for axes in both] for both in pairs]


def _strided_alike(tokens: list[Tensor]) -> list[list[int]]:
    groups = defaultdict(list)
    for i, x in enumerate(tokens):
        groups[x.stride()].append(i)
    return list(groups.values())


@dataclass
class _Source:
    """What a level reads: tokens (number 0), or sums over blocks `2**number` tokens long.

    Attributes:
        unit: tokens of a block on both axes.
        views: an array each, `[B, heads, rows, columns, head_dim]`, strided alike.
        counts: under a mask, existing tokens of each block, float32 `[B, rows, columns]`.
        d_views: gradients, like `views`, where they are being made.
        is_written: `d_views` hold something to add to.
    """

    unit: tuple[int, int]
    views: list[Tensor]
    counts: Tensor | None
    d_views: list[Tensor] | None = None
    is_written: bool = False


@dataclass
class _Level:
    """What is done for level `number`.

    Attributes:
        source: number of the source.
        side: units of the source in a cell, on both axes.
        emits: the level makes the next source.
        is_cut: some cell lacks tokens.
        scale: of the products of weights; a weight of the tables counts for a unit, not for a token.
        tables: the kernels by unit, `[arrays, side, rank, heads, head_dim]`, for both axes.
        summaries, factors: `[arrays, B, *lattice, heads, head_dim]`.
    """

    number: int
    source: int
    side: tuple[int, int]
    emits: bool
    is_cut: bool
    scale: float
    tables: list[Tensor] = field(default_factory=list)
    summaries: Tensor | None = None
    factors: Tensor | None = None


class _Pass:
    """One way up through the levels, done when made; with `learn`, ready for the way back."""

    def __init__(
        self,
        tokens: list[Tensor],
        kernels: list[Kernels],
        key_mask: Tensor | None,
        options: Options,
        levels: int,
        learn: bool,
    ):
        like = tokens[0]
        self.ndim, self.device, self.dtype = like.dim() - 3, like.device, like.dtype
        self.batch, self.heads, self.head_dim = like.shape[0], like.shape[1], like.shape[-1]
        self.grid = (1, *like.shape[2:-1])[-2:]
        self.options, self.kernels, self.learn = options, kernels, learn
        self.parts = (1, *tiling(options.rank, self.ndim))[-2:]
        used = [[self._used(learned, level) for learned in kernels] for level in range(1, levels + 1)]
        self.levels = self._plan(used, key_mask is not None)
        self._fill_tables(used)
        counts = None if key_mask is None else key_mask.reshape(self.batch, *self.grid).float()
        self.sources = [_Source((1, 1), [self._flat(x) for x in tokens], counts)]
        for level in self.levels:
            self._summarise(level)

    def _used(self, learned: Kernels, level: int) -> Sequence[Tensor]:
        if learned:
            return learned[min(level, len(learned)) - 1]
        return start_kernels(level, self.options.cell_size, self.options.rank, self.ndim, self.device)

    def _plan(self, used: list[list[Sequence[Tensor]]], masked: bool) -> list[_Level]:
        cell_size = self.options.cell_size
        blocks = [
            gcd(*(cell_side(number, cell_size) // w.shape[-1] for axes in kernels for w in axes))
            for number, kernels in enumerate(used, 1)
        ]
        plan, largest = [], 0  # number of the source with the largest blocks at hand
        for number, block in enumerate(blocks, 1):
            source = largest
            while block % (1 << source):
                source -= 1
            tokens = cell_side(number, cell_size)
            side = tokens >> source
            wanted = any(later % (2 << largest) == 0 for later in blocks[number:])
            emits = source == largest and side % 2 == 0 and wanted
            is_cut = masked or any(n % tokens for n in self.grid[-self.ndim :])
            sides = (side, side) if self.ndim == 2 else (1, side)
            plan.append(_Level(number, source, sides, emits, is_cut, 0.5 ** (source * self.ndim)))
            largest += emits
        return plan

    def _fill_tables(self, used: list[list[Sequence[Tensor]]]) -> None:
        """Lay the kernels out by unit: one copy for all levels whose cells have as many."""
        waiting = defaultdict(list)
        for level, kernels in zip(self.levels, used, strict=True):
            if self.ndim == 1:
                shape = (len(kernels), 1, self.options.rank, self.heads, self.head_dim)
                level.tables.append(torch.ones(shape, device=self.device))
            for axis in range(self.ndim):
                waiting[level.side[-1]].append((level, [axes[axis] for axes in kernels]))
        for side, entries in waiting.items():
            tables = self._by_unit([w for _, weights in entries for w in weights], side)
            for (level, _), table in zip(entries, tables.unflatten(0, (len(entries), -1)), strict=True):
                level.tables.append(table)

    def _by_unit(self, kernels: list[Tensor], side: int) -> Tensor:
        """`[kernels, side, p, heads, head_dim]`, float32, contiguous; all at once if they are alike."""
        if len({(w.shape, w.dtype) for w in kernels}) > 1:
            return torch.cat([self._by_unit([w], side) for w in kernels])
        weights, bins = torch.stack(kernels).float(), kernels[0].shape[-1]
        if bins != side:
            weights = weights.repeat_interleave(side // bins, -1) * (bins / side)
        return weights.expand(-1, -1, self.heads, self.head_dim, -1).permute(0, 4, 1, 2, 3).contiguous()

    def _flat(self, tokens: Tensor) -> Tensor:
        """`[B, heads, *grid, head_dim]` with a grid of two axes."""
        return tokens.unsqueeze(2) if self.ndim == 1 else tokens

    def _extents(self, unit: tuple[int, int]) -> tuple[int, int]:
        return tuple(-(-n // u) for n, u in zip(self.grid, unit, strict=True))

    def _cells(self, level: _Level) -> tuple[int, int]:
        rows, columns = self._extents(self.sources[level.source].unit)
        return -(-rows // level.side[0]), -(-columns // level.side[1])

    def _arguments(self, level: _Level, views: list[Tensor]) -> tuple[tuple, tuple, dict]:
        """What all kernels take: pointers and strides, sizes, and compile-time constants."""
        source = self.sources[level.source]
        *strides, last = views[0].stride()
        unit = gcd(*strides, MAX_ALIGNMENT)
        sizes = (self.batch, self.heads, *self.grid, *source.unit, level.scale)
        constants = dict(TENSORS=len(views), HEAD_DIM=self.head_dim, RANK=self.options.rank, PARTS_X=self.parts[1])
        constants |= dict(SIDE_Y=level.side[0], SIDE_X=level.side[1], VEC=unit)
        return (*_three(views), *(s // unit for s in strides), last, *level.tables, source.counts), sizes, constants

    def _summarise(self, level: _Level) -> None:
        source, cells = self.sources[level.source], self._cells(level)
        lattice = [c * p for c, p in zip(cells, self.parts, strict=True)]
        shape = (len(source.views), self.batch, *lattice, self.heads, self.head_dim)
        level.summaries = torch.empty(shape, device=self.device)
        if self.learn and level.is_cut:
            level.factors = torch.empty_like(level.summaries)
        blocks = None
        if level.emits:
            unit = tuple(2 * u if s > 1 else u for u, s in zip(source.unit, level.side, strict=True))
            shape = (len(source.views), self.batch, *self._extents(unit), self.heads, self.head_dim)
            blocks = torch.empty(shape, device=self.device)
            counts = source.counts
            if counts is not None:
                window = tuple(u // v for u, v in zip(unit, source.unit, strict=True))
                counts = F.avg_pool2d(counts[:, None], window, ceil_mode=True, divisor_override=1)[:, 0]
            self.sources.append(_Source(unit, [x.movedim(-2, 1) for x in blocks], counts))
        arguments, sizes, constants = self._arguments(level, source.views)
        for first in range(0, self.options.rank, MAX_RANKS):
            outputs = (level.summaries, level.factors, None if first else blocks)
            self._launch_by_cells(summarise_kernel, level, (*arguments, *outputs, *sizes, first), constants)

    def _launch_by_cells(self, kernel, level: _Level, arguments: tuple, constants: dict) -> None:
        pairs = triton.next_power_of_2(-(-min(level.side[1], MAX_COLUMNS) // 2))
        block_p = min(triton.next_power_of_2(self.options.rank), MAX_RANKS)
        block_d = triton.next_power_of_2(self.head_dim)
        cells = self.batch * prod(self._cells(level))

        def launch(tile: tiles.Tile) -> None:
            block = max(1, tile.block // (pairs * block_p * block_d))
            grid = (triton.cdiv(cells, block) * self.heads * constants["TENSORS"],)
            blocks = dict(CELLS=block, PAIRS=pairs, BLOCK_P=block_p, BLOCK_D=block_d)
            kernel[grid](*arguments, **constants, **blocks, num_warps=tile.num_warps, num_stages=tile.num_stages)

        self._on_device(kernel, launch)

    def _on_device(self, kernel, launch) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            tiles.launch(kernel.__name__, self.device, self.head_dim, self.dtype, launch)

    def backward(self, d_lattices: list[list[Tensor]], d_tokens: list[Tensor], grads: list[Kernels]) -> None:
        """Put the gradients of the tokens into `d_tokens`, and add those of the kernels to `grads` (float32)."""
        self.sources[0].d_views = [self._flat(x.movedim(-2, 1)) for x in d_tokens]
        for level in reversed(self.levels):
            d_summaries = [lattices[level.number - 1].contiguous() for lattices in d_lattices]
            if any(self.kernels):
                self._weight_gradient(level, d_summaries, grads)
            self._source_gradient(level, d_summaries)

    def _source_gradient(self, level: _Level, d_summaries: list[Tensor]) -> None:
        source = self.sources[level.source]
        if source.d_views is None:
            source.d_views = [torch.empty_like(x) for x in source.views]
        arguments, sizes, constants = self._arguments(level, source.d_views)
        d_blocks = self.sources[level.source + 1].d_views if level.emits else [None]
        for first in range(0, self.options.rank, MAX_RANKS):
            inputs = (*_three(d_summaries), level.factors, *_three([None] if first else d_blocks))
            own = constants | dict(ADD=source.is_written or first > 0)
            self._launch_by_cells(source_gradient_kernel, level, (*arguments, *inputs, *sizes, first), own)
        source.is_written = True

    def _weight_gradient(self, level: _Level, d_summaries: list[Tensor], grads: list[Kernels]) -> None:
        source = self.sources[level.source]
        arguments, sizes, constants = self._arguments(level, source.views)
        rank, count, cells = self.options.rank, len(source.views), self.batch * prod(self._cells(level))
        block_p, block_d = (triton.next_power_of_2(n) for n in (min(rank, MAX_RANKS), self.head_dim))
        block_x = triton.next_power_of_2(min(level.side[1], MAX_COLUMNS))
        rows = self.heads * count * level.side[0] * triton.cdiv(level.side[1], block_x)
        partial = None

        def launch(tile: tiles.Tile) -> None:
            nonlocal partial
            block = max(1, tile.block // (block_x * block_p * block_d))
            blocks = triton.cdiv(cells, block)
            run = triton.cdiv(blocks, max(1, PROGRAMS // rows))
            runs = triton.cdiv(blocks, run)
            partial = torch.empty((runs, count, *level.side, rank, self.heads, self.head_dim), device=self.device)
            own = (level.summaries, level.factors, *_three(d_summaries), partial, *sizes)
            for first in range(0, rank, MAX_RANKS):
                weight_gradient_kernel[(rows * runs,)](
                    *arguments, *own, first, run, **constants, CELLS=block, BLOCK_X=block_x, BLOCK_P=block_p,
                    BLOCK_D=block_d, num_warps=tile.num_warps, num_stages=tile.num_stages,
                )  # fmt: skip

        self._on_device(weight_gradient_kernel, launch)
        total = partial.sum(0)  # [arrays, side, side, p, heads, head_dim]
        table_y, table_x = level.tables
        d_tables = ((total * table_x[:, None]).sum(2), (total * table_y[:, :, None]).sum(1))
        d_tables, by_shape = torch.stack(d_tables[-self.ndim :]), {}
        for n, learned in enumerate(self.kernels):
            if learned:
                for axis, grad in enumerate(grads[n][min(level.number, len(learned)) - 1]):
                    if grad.shape not in by_shape:  # those of other kernels are most likely of this shape, too
                        by_shape[grad.shape] = _by_bin(d_tables, grad.shape)
                    grad += by_shape[grad.shape][axis, n]


def _by_bin(d_tables: Tensor, shape: torch.Size) -> Tensor:
    """Gradients of kernels of a shape, `[axes, arrays, *shape]`, from `[axes, arrays, side, p, heads, head_dim]`."""
    bins, side = shape[-1], d_tables.shape[2]
    d_kernels = d_tables.unflatten(2, (bins, -1)).sum(3).movedim(2, -1) * (bins / side)
    return d_kernels.sum_to_size(*d_tables.shape[:2], *shape)


def _three(x: list) -> list:
    """Three pointers for a kernel that chooses among them."""
    return [*x, *[x[0]] * (3 - len(x))]


def start_kernels(level: int, cell_size: int, rank: int, ndim: int, device: torch.device) -> list[Tensor]:
    """As `fma2d.start_kernels`, for all heads and channels, made on the device.

    A CUDA graph cannot copy from the host, and must not find in its memory what was kept from an earlier call.
    """
    parts, bins = tiling(rank, ndim), cell_size
    if any(cell_size % p for p in parts):
        bins = cell_side(level, cell_size)
    index, kernels = torch.arange(rank, device=device), []
    for p in reversed(parts):
        shares = overlaps(bins, p, device).T / bins
        kernels.insert(0, shares[index % p][:, None, None].contiguous())
        index = index // p
    return kernels


def overlaps(side: int, parts: int, device: torch.device) -> Tensor:
    """`[side, parts]`: how much of each token of a cell lies in each sub-cell, in units of `1 / parts` tokens."""
    token = torch.arange(side, device=device)[:, None] * parts
    part = torch.arange(parts, device=device) * side
    return (torch.minimum(token + parts, part + side) - torch.maximum(token, part)).clamp(min=0).to(torch.float32)
