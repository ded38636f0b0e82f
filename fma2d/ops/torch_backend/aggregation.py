"""Learned separable aggregation: the tokens of a coarse cell become its summary tokens.

A level works on sums over blocks of `s_l / bins` tokens a side, in which its kernels are constant, one axis after the
other; larger blocks are summed from smaller ones. Summary tokens lie in a *lattice*: sub-cell `k_a` of cell `c_a` at
`c_a * p_a + k_a`. Tokens are `[B, *grid, heads, head_dim]`, lattices `[B, *lattice, heads, head_dim]`.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d

from ...geometry import cell_side, subcell_counts, tiling
from ...kernels import level_kernels, start_kernels
from ..call import Call
from .cells import followed

# Block sums are taken in pieces of about this many elements.
PIECE = 1 << 20


class Aggregation:
    """The lattices of all levels, of one tensor or of several with a common memory, and their gradients.

    From its sums, each size of block gives the lattices of the levels that use it and the sums over larger blocks, in
    pieces of some rows of cells.

    Args:
        tokens: `[B, *grid, kinds * heads, head_dim]`, absent ones zero.
        kinds: which of the kernels' kinds each run of heads has.
        dtype: to compute in.
        learn: whether `down` will be asked for.
    """

    def __init__(self, call: Call, tokens: Tensor, kinds: list[int], dtype: torch.dtype, learn: bool):
        self.call, self.kinds, self.dtype, self.learn = call, kinds, dtype, learn
        self.grid, self.parts = call.grid, tiling(call.options.rank, len(call.grid))
        self.mask = None if call.key_mask is None else call.key_mask[..., None, None]
        stacks = [stack.to(dtype) for stack in call.kernels]  # once: levels that share one add up in this dtype
        self.weights = [self._weights(level, stacks) for level in range(1, call.levels + 1)]
        self.sizes = [self._side(level) // w.shape[-1] for level, w in enumerate(self.weights, 1)]
        # By size of block: the levels that use it, the larger sizes summed from it, its sums.
        self.users = {size: [i + 1 for i, s in enumerate(self.sizes) if s == size] for size in sorted({1, *self.sizes})}
        self.larger: dict[int, list[int]] = {size: [] for size in self.users}
        for size in list(self.users)[1:]:
            self.larger[max(s for s in self.users if s < size and size % s == 0)].append(size)
        self.sums = {1: tokens}
        self.lattices: dict[int, Tensor] = {}
        self._kept: dict[int, list[Tensor]] = {}  # by level, what `_contract` gave where there is one piece
        for size, larger in self.larger.items():
            outputs = [[] for _ in larger + self.users[size]]
            for rows, x in self._pieces(size):
                pooled = [_pool(x, n // size) for n in larger]
                lattices = [self._lattice(self._summarise(level, rows, x)) for level in self.users[size]]
                for into, piece in zip(outputs, pooled + lattices, strict=True):
                    into.append(piece)
            joined = [x[0] if len(x) == 1 else torch.cat(x, 1) for x in outputs]
            self.sums.update(zip(larger, joined, strict=False))
            self.lattices.update(zip(self.users[size], joined[len(larger) :], strict=True))

    def _side(self, level: int) -> int:
        return cell_side(level, self.call.options.cell_size)

    def _weights(self, level: int, stacks: list[Tensor]) -> Tensor:
        """The kernels of a level, `[axes, rank, kinds * heads | 1, head_dim | 1, bins]`."""
        options, kernels = self.call.options, level_kernels(stacks, level)
        if kernels is None:
            sizes = (level, options.cell_size, options.rank, len(self.grid), 1, 1)
            start = start_kernels(*sizes, variant=options.variant, dtype=self.dtype, device=self.call.q.device)
            return start[0]
        kernels = kernels[self.kinds]
        return kernels.expand(-1, -1, -1, self.call.q.shape[1], -1, -1).movedim(0, 2).flatten(2, 3)

    def _pieces(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows of a size's block sums: whole cells of all that is made of them."""
        sums = self.sums[size]
        bins = [self.weights[level - 1].shape[-1] for level in self.users[size]]
        least = lcm(*bins, *(larger // size for larger in self.larger[size]))
        step = least * max(1, PIECE // max(1, least * sums[:, :1].numel()))
        for start in range(0, sums.shape[1], step):
            rows = slice(start, min(sums.shape[1], start + step))
            yield rows, sums[:, rows].to(self.dtype)

    def _summarise(self, level: int, rows: slice, x: Tensor) -> Tensor:
        """Summary tokens of a piece, `[rank, B, *cells, heads, head_dim]`."""
        weights = self.weights[level - 1]
        sums = _contract(x, weights / self._side(level))
        if self.learn and rows.stop - rows.start == self.sums[self.sizes[level - 1]].shape[1]:
            self._kept[level] = sums
        return self._complete(sums[-1], level, weights, rows) if self._is_cut(level, rows) else sums[-1]

    def _is_cut(self, level: int, rows: slice) -> bool:
        """Whether cells of a piece may lack tokens."""
        side = self._side(level)
        cut = [extent % side > 0 for extent in self.grid]
        return self.mask is not None or any(cut[1:]) or (cut[0] and self._is_last(level, rows))

    def _is_last(self, level: int, rows: slice) -> bool:
        return rows.stop * self.sizes[level - 1] >= self.grid[0]

    def _complete(self, summary: Tensor, level: int, weights: Tensor, rows: slice) -> Tensor:
        """Scale up what cells with absent tokens give, `[rank, B, *cells, heads, head_dim]`.

        What a summary token without tokens of its own gives is 0, whatever its kernel holds.
        """
        ndim, side, size = len(self.grid), self._side(level), self.sizes[level - 1]
        weight = weights.abs()
        if self.mask is None:
            # It separates by axis: only the last cell of an axis may be cut.
            for axis, extent in enumerate(self.grid):
                if extent % side == 0 or (axis == 0 and not self._is_last(level, rows)):
                    continue
                counts, present = _cut_cell(extent, side, size, self.parts, axis, self.dtype, weight.device)
                left = (weight[axis] * counts).sum(-1)
                ratio = _ratio(weight[axis].sum(-1) * size, left, (left > 0) & present)
                ratio = ratio.reshape(len(ratio), *(1,) * (1 + ndim), *ratio.shape[1:])
                cells = summary.shape[2 + axis]
                whole, cut = summary.split([cells - 1, 1], 2 + axis)
                summary = torch.cat((whole, cut * ratio), 2 + axis)
            return summary
        mask = self.mask[:, rows.start * size : rows.stop * size].to(self.dtype)
        left = _contract(_pool(mask, size), weight / side)[-1]
        whole = weight.sum(-1).prod(0) * (size / side) ** ndim
        whole = whole.reshape(len(whole), *(1,) * (1 + ndim), *whole.shape[1:])
        sizes = (level, self.call.options.cell_size, self.call.options.rank, ndim, 1, 1)
        own = start_kernels(*sizes, bins=side, dtype=self.dtype, device=mask.device)[0]
        present = (left > 0) & (_contract(mask, own)[-1] > 0)
        full = _contract(mask, torch.ones_like(own[:, :1]))[-1] == side**ndim
        # The sum is divided first, so that a small rest of the weight makes no inf.
        return torch.where(full, summary, _ratio(summary, left, present) * whole)

    def _lattice(self, summary: Tensor) -> Tensor:
        """`[rank, B, *cells, heads, head_dim]` to `[B, *lattice, heads, head_dim]`."""
        ndim = len(self.grid)
        summary = summary.unflatten(0, self.parts)
        summary = summary.permute(ndim, *(d for axis in range(ndim) for d in (ndim + 1 + axis, axis)), -2, -1)
        for axis in range(1, 1 + ndim):
            summary = summary.flatten(axis, axis + 1)
        return summary

    def _cells(self, lattice: Tensor) -> Tensor:
        """The way back of `_lattice`."""
        ndim = len(self.grid)
        for axis, p in enumerate(self.parts):
            lattice = lattice.unflatten(1 + 2 * axis, (-1, p))
        return lattice.permute(*range(2, 2 + 2 * ndim, 2), 0, *range(1, 1 + 2 * ndim, 2), -2, -1).flatten(0, ndim - 1)

    def down(self, d_lattices: dict[int, Tensor], d_tokens: list[Tensor]) -> list[Tensor]:
        """Add the gradients of the lattices to those of the tokens; return those of the stacks of kernels.

        Args:
            d_lattices: by level, like `lattices`.
            d_tokens: of each kind, `[B, *grid, heads, head_dim]`.
        """
        d_weights = [torch.zeros_like(w) for w in self.weights]
        d_sums = {size: [torch.zeros_like(self.sums[size])] for size in self.users if size > 1} | {1: d_tokens}
        for size in reversed(self.users):
            larger, users = self.larger[size], self.users[size]
            for rows, x in self._pieces(size) if larger or users else ():
                into = [d[:, rows] for d in d_sums[size]]
                for n in larger:
                    d_larger = d_sums[n][0][:, rows.start * size // n : -(-rows.stop * size // n)]
                    _spread(d_larger, n // size, into)
                for level in users:
                    step = self._side(level) // size
                    cells = slice(rows.start // step * self.parts[0], -(-rows.stop // step) * self.parts[0])
                    d = self._summarise_backward(level, rows, x, d_lattices[level][:, cells], d_weights[level - 1])
                    for to, piece in zip(into, d.chunk(len(into), -2), strict=True):
                        to += piece
        if not self.call.kernels:
            return []
        with followed():
            stacks = [stack.detach().to(self.dtype).requires_grad_() for stack in self.call.kernels]
            used = [self._weights(level, stacks) for level in range(1, len(d_weights) + 1)]
            return list(torch.autograd.grad(used, stacks, d_weights, allow_unused=True, materialize_grads=True))

    def _summarise_backward(self, level: int, rows: slice, x: Tensor, d_lattice: Tensor, d_weights: Tensor) -> Tensor:
        """The gradient of a piece's block sums; that of the weights is added to `d_weights`."""
        weights, side, d = self.weights[level - 1], self._side(level), self._cells(d_lattice)
        sums = self._kept.pop(level, None) or _contract(x, weights / side)
        if self._is_cut(level, rows):
            with followed():
                leaves = [t.detach().requires_grad_() for t in (sums[-1], weights)]
                completed = self._complete(leaves[0], level, leaves[1], rows)
                d, d_own = torch.autograd.grad(completed, leaves, d, materialize_grads=True)
            d_weights += d_own
        for axis in reversed(range(len(self.grid))):
            d_own = d_weights[axis] if self.call.kernels else None
            d = _contract_axis_backward(sums[axis], weights[axis] / side, axis, d, d_own, side)
        return d


def _contract(x: Tensor, weights: Tensor) -> list[Tensor]:
    """Sum the blocks of each cell by weight, one axis after the other.

    Args:
        x: `[B, *blocks, heads, head_dim]`.
        weights: `[axes, rank, heads | 1, head_dim | 1, bins]`, bins blocks a cell; blocks that lack are 0.

    Returns:
        x, the sums along the first axis, and so on; at last `[rank, B, *cells, heads, head_dim]`.
    """
    sums = [x]
    for axis, weight in enumerate(weights):
        total = None
        for block, bin_weight, cells in _bins(sums[-1], weight, axis):
            if total is None:
                total = block * bin_weight
            else:
                total[cells].addcmul_(block, bin_weight)
        sums.append(total)
    return sums


def _contract_axis_backward(x: Tensor, weight: Tensor, axis: int, d: Tensor, d_weight: Tensor | None, side: int):
    """The gradient of x in one step of `_contract`; that of the kernels, `side` times the weight, is added."""
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    d_bins = None if d_weight is None else d_weight.unbind(-1)
    for i, (block, bin_weight, cells) in enumerate(_bins(x, weight, axis)):
        into = d_x[(slice(None),) * (axis + (axis > 0) + 1) + (slice(i, None, weight.shape[-1]),)]
        if axis == 0:
            torch.sum(d[cells] * bin_weight, 0, out=into)
        else:
            torch.mul(d[cells], bin_weight, out=into)
        if d_bins is not None:
            d_own = (d[cells] * block).flatten(1, -3).sum(1).sum_to_size(d_bins[i].shape)
            d_bins[i].add_(d_own, alpha=1 / side)
    return d_x


def _bins(x: Tensor, weight: Tensor, axis: int) -> Iterator[tuple[Tensor, Tensor, tuple]]:
    """Each bin's block of every cell of an axis that has one, its weight, and the index of these cells.

    x is `[B, *blocks, heads, head_dim]`, with the rank in front from the second axis on.
    """
    bins, before = weight.shape[-1], (slice(None),) * (1 + axis + (axis > 0))
    ndim = x.dim() - 3 - (axis > 0)
    weights = weight.movedim(-1, 0).reshape(bins, len(weight), *(1,) * (1 + ndim), *weight.shape[1:3])
    cells, extent = -(-x.shape[len(before)] // bins), x.shape[len(before)]
    for i, bin_weight in enumerate(weights.unbind(0)[:extent]):
        count = -(-(extent - i) // bins)
        index = ... if count == cells else (slice(None), *before[axis > 0 :], slice(count))
        yield x[(*before, slice(i, None, bins))], bin_weight, index


def _spread(d: Tensor, size: int, into: list[Tensor]) -> None:
    """The gradient of `_pool`: add d to every position of its block; `into` has d's heads in several tensors."""
    for axis in range(1, d.dim() - 2):
        d = d.repeat_interleave(size, axis)[(slice(None),) * axis + (slice(into[0].shape[axis]),)]
    for to, piece in zip(into, d.chunk(len(into), -2), strict=True):
        to += piece


@lru_cache
@torch.inference_mode(False)  # what is kept serves calls of every mode
def _cut_cell(
    extent: int, side: int, size: int, parts: tuple[int, ...], axis: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Of the cut cell at the end of an axis: the tokens of each block `[bins]`, and which summary tokens have any."""
    start = torch.arange(0, side, size, device=device)
    p = parts[axis]
    counts = subcell_counts(extent, side, p)[-p:]
    present = [counts[index[axis]] > 0 for index in product(*map(range, parts))]
    return (extent % side - start).clamp(0, size).to(dtype), torch.tensor(present, device=device)[:, None, None]


def _pool(x: Tensor, size: int) -> Tensor:
    """Sums over `size` positions on every axis of `[B, *grid, heads, head_dim]`, fewer at the ends."""
    if size == 1:
        return x
    channels = x.flatten(-2).movedim(-1, 1)  # pooling takes them first, and leaves them last in memory
    if x.dim() == 6:
        sums = avg_pool3d(channels, [min(size, n) for n in x.shape[1:4]], ceil_mode=True, divisor_override=1)
    elif x.dim() == 5:
        sums = avg_pool2d(channels, [min(size, n) for n in x.shape[1:3]], ceil_mode=True, divisor_override=1)
    else:
        sums = avg_pool2d(channels.unsqueeze(2), (1, min(size, x.shape[1])), ceil_mode=True, divisor_override=1)[
            :, :, 0
        ]
    return sums.movedim(1, -1).unflatten(-1, x.shape[-2:])


def _ratio(x: Tensor, left: Tensor, present: Tensor) -> Tensor:
    """`x / left` where present, else 0."""
    return torch.where(present, x / torch.where(present, left, 1), 0)
