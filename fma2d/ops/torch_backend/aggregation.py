"""Learned separable aggregation: the tokens of a coarse cell become its summary tokens.

A level works on sums over blocks of `s_l / bins` tokens a side, in which its kernels are constant, one axis after the
other; larger blocks are summed from smaller ones. Summary tokens lie in a *lattice*: sub-cell `k_a` of cell `c_a` at
`c_a * p_a + k_a`. Arrays are `[B, *grid, channels]` here, the channels those of all heads.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import gcd, lcm, prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...geometry import cell_side, subcell_counts, tiling
from ...kernels import level_kernels, start_kernels
from ..call import Call
from .cells import followed

# Block sums are taken in pieces of about this many elements.
PIECE = 3 << 19
# Kernels are written out for up to this many positions side by side: short inner loops cost most.
BESIDE = 8


class Aggregation:
    """The lattices of all levels, of one tensor or of several with a common memory, and their gradients.

    From its sums, each size of block gives the lattices of the levels that use it and the sums over larger blocks, in
    pieces of some rows of cells.

    Args:
        tokens: `[B, *grid, kinds * heads, head_dim]`, absent ones zero.
        kinds: which of the kernels' kinds each run of heads has.
        dtype: to compute in.
        learn: whether `down` will be asked for.

    Attributes:
        lattices: by level, `[B, *lattice, kinds * heads, head_dim]`.
    """

    def __init__(self, call: Call, tokens: Tensor, kinds: list[int], dtype: torch.dtype, learn: bool):
        self.call, self.kinds, self.dtype, self.learn = call, kinds, dtype, learn
        self.grid, self.parts = call.grid, tiling(call.options.rank, len(call.grid))
        stacks = [stack.to(dtype) for stack in call.kernels]  # once: levels that share one add up in this dtype
        self.weights = [self._weights(level, stacks) for level in range(1, call.levels + 1)]
        self.sizes = [self._side(level) // w.shape[1] for level, w in enumerate(self.weights, 1)]
        # By size of block: the levels that use it, the larger sizes summed from it, its sums.
        self.users = {size: [i + 1 for i, s in enumerate(self.sizes) if s == size] for size in sorted({1, *self.sizes})}
        self.larger: dict[int, list[int]] = {size: [] for size in self.users}
        for size in list(self.users)[1:]:
            self.larger[max(s for s in self.users if s < size and size % s == 0)].append(size)
        self.sums = {1: tokens.flatten(-2)}
        self.lattices: dict[int, Tensor] = {}
        self._kept: dict[int, list[Tensor]] = {}  # by level, what `_contract` gave where there is one piece
        for size, larger in self.larger.items():
            made = {}
            for entries, rows, x in self._pieces(size):
                pooled = [_pool(x, n // size) for n in larger]
                lattices = [self._lattice(self._summarise(level, entries, rows, x)) for level in self.users[size]]
                made.setdefault(entries.start, []).append(pooled + lattices)
            columns = ([_join(x, 1) for x in zip(*of_entries, strict=True)] for of_entries in made.values())
            joined = [_join(x, 0) for x in zip(*columns, strict=True)]
            self.sums.update(zip(larger, joined, strict=False))
            lattices = (x.unflatten(-1, tokens.shape[-2:]) for x in joined[len(larger) :])
            self.lattices.update(zip(self.users[size], lattices, strict=True))
            if not learn:
                del self.sums[size]

    def _side(self, level: int) -> int:
        return cell_side(level, self.call.options.cell_size)

    def _weights(self, level: int, stacks: list[Tensor]) -> Tensor:
        """What a block weighs: the kernels of a level over its side, `[axes, bins, rank, channels]`."""
        options, kernels = self.call.options, level_kernels(stacks, level)
        if kernels is None:
            sizes = (level, options.cell_size, options.rank, len(self.grid), 1, 1)
            kernels = start_kernels(*sizes, variant=options.variant, dtype=self.dtype, device=self.call.q.device)
        heads, head_dim = self.call.q.shape[1], self.call.q.shape[-1]
        kernels = kernels[self.kinds].expand(-1, -1, -1, heads, head_dim, -1) / self._side(level)
        return kernels.permute(1, 5, 2, 0, 3, 4).flatten(3)

    def _pieces(self, size: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Batch entries and rows of a size's block sums: some entries, or of one whole cells of all made of them."""
        sums = self.sums[size]
        entry = max(1, sums[:1].numel())
        bins = [self.weights[level - 1].shape[1] for level in self.users[size]]
        least = lcm(*bins, *(larger // size for larger in self.larger[size]))
        step = sums.shape[1]
        if entry > PIECE:
            step = least * max(1, PIECE // (least * sums[:1, :1].numel()))
        for first in range(0, max(1, len(sums)), max(1, PIECE // entry)):
            entries = slice(first, min(len(sums), first + max(1, PIECE // entry)))
            for start in range(0, sums.shape[1], step):
                rows = slice(start, min(sums.shape[1], start + step))
                yield entries, rows, sums[entries, rows].to(self.dtype)

    def _summarise(self, level: int, entries: slice, rows: slice, x: Tensor) -> Tensor:
        """Summary tokens of a piece, `[rank, B, *cells, channels]`."""
        sums = _contract(x, self.weights[level - 1])
        if self.learn and len(x) == len(self.sums[1]) and x.shape[1] == self.sums[self.sizes[level - 1]].shape[1]:
            self._kept[level] = sums
        summary = sums[-1]
        if self.call.key_mask is not None:
            return self._complete_masked(summary, level, self.weights[level - 1], entries, rows)
        for at, ratio in self._cuts(level, self.weights[level - 1], rows):
            summary = summary.clone() if summary is sums[-1] else summary
            summary[at] *= ratio
        return summary

    def _cuts(self, level: int, weights: Tensor, rows: slice) -> Iterator[tuple[tuple, Tensor]]:
        """Of each axis that cuts its last cell: the index of these cells of a piece, and by how much to scale them up.

        It separates by axis. What a summary token without tokens of its own gives is 0, whatever its kernel holds.
        """
        side, size = self._side(level), self.sizes[level - 1]
        for axis, extent in enumerate(self.grid):
            if extent % side and (axis or rows.stop * size >= extent):
                counts, present = _cut_cell(extent, side, size, self.parts, axis, self.dtype, weights.device)
                weight = weights[axis].abs()
                left = (weight * counts).sum(0)
                ratio = _ratio(weight.sum(0) * size, left, (left > 0) & present)
                yield (
                    (..., slice(-1, None), *[slice(None)] * (len(self.grid) - axis)),
                    ratio.reshape(len(ratio), *[1] * (1 + len(self.grid)), -1),
                )

    def _complete_masked(self, summary: Tensor, level: int, weights: Tensor, entries: slice, rows: slice) -> Tensor:
        """Scale up what cells with absent tokens give, where any token may be absent."""
        ndim, side, size = len(self.grid), self._side(level), self.sizes[level - 1]
        mask = self.call.key_mask[entries, rows.start * size : rows.stop * size, ..., None].to(self.dtype)
        left = _contract(_pool(mask, size).expand(*[-1] * (1 + ndim), weights.shape[-1]), weights.abs())[-1]
        whole = weights.abs().sum(1).prod(0).reshape(len(summary), *[1] * (1 + ndim), -1) * size**ndim
        sizes = (level, self.call.options.cell_size, self.call.options.rank, ndim, 1, 1)
        own = start_kernels(*sizes, bins=side, dtype=self.dtype, device=mask.device)[0, ..., 0, :].permute(0, 3, 1, 2)
        present = (left > 0) & (_contract(mask, own)[-1] > 0)
        full = _contract(mask, torch.ones_like(own[:, :, :1]))[-1] == side**ndim
        # The sum is divided first, so that a small rest of the weight makes no inf.
        return torch.where(full, summary, _ratio(summary, left, present) * whole)

    def _lattice(self, summary: Tensor) -> Tensor:
        """`[rank, B, *cells, channels]` to `[B, *lattice, channels]`."""
        ndim = len(self.grid)
        summary = summary.unflatten(0, self.parts)
        summary = summary.permute(ndim, *(d for axis in range(ndim) for d in (ndim + 1 + axis, axis)), -1)
        for axis in range(1, 1 + ndim):
            summary = summary.flatten(axis, axis + 1)
        return summary

    def _cells(self, lattice: Tensor) -> Tensor:
        """The way back of `_lattice`, a copy."""
        ndim = len(self.grid)
        for axis, p in enumerate(self.parts):
            lattice = lattice.unflatten(1 + 2 * axis, (lattice.shape[1 + 2 * axis] // p, p))
        lattice = lattice.permute(*range(2, 2 + 2 * ndim, 2), 0, *range(1, 1 + 2 * ndim, 2), -1)
        return lattice.clone(memory_format=torch.contiguous_format).flatten(0, ndim - 1)

    def down(self, d_lattices: dict[int, Tensor], d_tokens: list[Tensor]) -> list[Tensor]:
        """Add the gradients of the lattices to those of the tokens; return those of the stacks of kernels. Once only.

        Args:
            d_lattices: by level, like `lattices`.
            d_tokens: of each kind, `[B, *grid, heads, head_dim]`.
        """
        d_weights = [torch.zeros_like(w) for w in self.weights]
        d_sums: dict[int, Tensor] = {}
        for size in reversed(self.users):
            larger, users = self.larger[size], self.users[size]
            if size > 1:
                d_sums[size] = torch.zeros_like(self.sums[size])
            for entries, rows, x in self._pieces(size) if larger or users else ():
                total = None
                for n in larger:
                    d = d_sums[n][entries, rows.start * size // n : -(-rows.stop * size // n)]
                    d = _pool_backward(d, n // size, x.shape)
                    total = d if total is None else total.add_(d)
                for level in users:
                    step = self._side(level) // size
                    cells = slice(rows.start // step * self.parts[0], -(-rows.stop // step) * self.parts[0])
                    d = self._cells(d_lattices[level].flatten(-2)[entries, cells])
                    d = self._summarise_backward(level, entries, rows, x, d, d_weights[level - 1])
                    total = d if total is None else total.add_(d)
                if size > 1:
                    d_sums[size][entries, rows] += total
                else:
                    for to, piece in zip(d_tokens, total.chunk(len(d_tokens), -1), strict=True):
                        to[entries, rows] += piece.unflatten(-1, to.shape[-2:])
            for n in (size, *larger):  # what is done with, so that less is held
                (self.sums if n == size else d_sums).pop(n)
        if not self.call.kernels:
            return []
        with followed():
            stacks = [stack.detach().to(self.dtype).requires_grad_() for stack in self.call.kernels]
            used = [self._weights(level, stacks) for level in range(1, len(d_weights) + 1)]
            return list(torch.autograd.grad(used, stacks, d_weights, allow_unused=True, materialize_grads=True))

    def _summarise_backward(
        self, level: int, entries: slice, rows: slice, x: Tensor, d: Tensor, d_weights: Tensor
    ) -> Tensor:
        """The gradient of a piece's block sums; that of the weights is added to `d_weights`, `d` is overwritten."""
        weights = self.weights[level - 1]
        sums = self._kept.pop(level, None) or _contract(x, weights)
        leaf = weights.detach().requires_grad_()
        if self.call.key_mask is not None:
            with followed():
                summary = sums[-1].detach().requires_grad_()
                completed = self._complete_masked(summary, level, leaf, entries, rows)
            d, d_own = torch.autograd.grad(completed, (summary, leaf), d)
            d_weights += d_own
        else:
            with followed():
                cuts = list(self._cuts(level, leaf, rows))
            summary, d_ratios = sums[-1].clone() if cuts else None, []
            before = []
            for at, ratio in cuts:
                before.append(summary[at].clone())
                summary[at] *= ratio
            for (at, ratio), own in zip(reversed(cuts), reversed(before), strict=True):
                d_ratios.append((own * d[at]).sum_to_size(ratio.shape))
                d[at] *= ratio
            if cuts:
                d_weights += torch.autograd.grad([ratio for _, ratio in reversed(cuts)], leaf, d_ratios)[0]
        for axis in reversed(range(len(self.grid))):
            d_own = d_weights[axis] if self.call.kernels else None
            d = _contract_axis_backward(sums[axis], weights[axis], d, d_own)
        filled = [-(-n // weights.shape[1]) * weights.shape[1] for n in x.shape[1:-1]]
        return _trim(d.view(len(x), *filled, x.shape[-1]), x.shape)


def _contract(x: Tensor, weights: Tensor) -> list[Tensor]:
    """Sum the blocks of each cell by weight, one axis after the other.

    Args:
        x: `[B, *blocks, channels]`; blocks that lack at the ends of the grid are 0.
        weights: `[axes, bins, rank, channels]`, bins blocks a cell.

    Returns:
        What each axis sums, `[1 | rank, before, bins, behind, channels]`, then `[rank, B, *cells, channels]`.
    """
    bins = weights.shape[1]
    x = _fill(x, bins)
    shape = (x.shape[0], *(n // bins for n in x.shape[1:-1]), x.shape[-1])
    before, behind, blocks = x.shape[0], prod(x.shape[1:-1]), x.shape[1:-1]
    sums, x = [], x[None]
    for n, weight in zip(blocks, weights, strict=True):
        before, behind = before * (n // bins), behind // n
        x = x.reshape(len(x), before, bins, behind, shape[-1])
        sums.append(x)
        x, wide = _widen(x, weight)
        total = x[:, :, 0] * wide[0]
        for i in range(1, bins):
            total.addcmul_(x[:, :, i], wide[i])
        x = total
    return [*sums, x.view(len(x), *shape)]


def _contract_axis_backward(x: Tensor, weight: Tensor, d: Tensor, d_weight: Tensor | None) -> Tensor:
    """The gradient of what one axis of `_contract` sums; that of its weight `[bins, rank, channels]` is added."""
    shape = x.shape
    x, wide = _widen(x, weight)
    d = d.reshape(weight.shape[1], shape[1], *x.shape[3:])
    each, wide = d[:, :, None], wide.movedim(0, 2)
    d_x = each[:1] * wide[:1] if len(x) == 1 else each * wide
    for r in range(1, len(d)) if len(x) == 1 else ():
        d_x.addcmul_(each[r : r + 1], wide[r : r + 1])
    if d_weight is not None:
        for i in range(len(d_weight)):
            d_weight[i] += (d * x[:, :, i]).view(len(d), shape[1] * shape[3], shape[4]).sum(1)
    return d_x.view(shape)


def _widen(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight with several positions as one: `[.., bins, behind / n, n * channels]`, `[bins, rank, 1, 1, ..]`."""
    beside = gcd(x.shape[3], BESIDE)
    return x.reshape(*x.shape[:3], x.shape[3] // beside, beside * x.shape[4]), weight.repeat(1, 1, beside)[
        :, :, None, None
    ]


def _join(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _fill(x: Tensor, size: int) -> Tensor:
    """Zeros up to whole runs of `size` positions on every axis of `[B, *grid, channels]`."""
    lack = [-n % size for n in x.shape[1:-1]]
    return pad(x, [0, 0, *(n for lacks in reversed(lack) for n in (0, lacks))]) if any(lack) else x


def _trim(x: Tensor, shape: torch.Size) -> Tensor:
    """The way back."""
    return x[tuple(slice(n) for n in shape)]


def _pool(x: Tensor, size: int) -> Tensor:
    """Sums over `size` positions on every axis of `[B, *grid, channels]`, fewer at the ends."""
    return x if size == 1 else _contract(x, x.new_ones(x.dim() - 2, size, 1, x.shape[-1]))[-1][0]


def _pool_backward(d: Tensor, size: int, shape: torch.Size) -> Tensor:
    """d at every position of its block, for x of a shape."""
    ndim = d.dim() - 2
    for axis in range(ndim):
        d = d.unsqueeze(2 + 2 * axis)
    d = d.expand(-1, *(-1, size) * ndim, -1)
    for axis in range(ndim):
        d = d.flatten(1 + axis, 2 + axis)
    return _trim(d.contiguous(), shape)


@lru_cache
@torch.inference_mode(False)  # what is kept serves calls of every mode
def _cut_cell(
    extent: int, side: int, size: int, parts: tuple[int, ...], axis: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of the cut cell at the end of an axis: the tokens of each block `[bins, 1, 1]`, which summary tokens have any."""
    start = torch.arange(0, side, size, device=device)
    p = parts[axis]
    counts = subcell_counts(extent, side, p)[-p:]
    present = [counts[index[axis]] > 0 for index in product(*map(range, parts))]
    return (extent % side - start).clamp(0, size).to(dtype)[:, None, None], torch.tensor(present, device=device)[
        :, None
    ]


def _ratio(x: Tensor, left: Tensor, present: Tensor) -> Tensor:
    """`x / left` where present, else 0."""
    return torch.where(present, x / torch.where(present, left, 1), 0)
