"""Learned separable aggregation: the tokens of a coarse cell become its summary tokens.

A level works on sums over blocks of `s_l / bins` tokens a side, in which its kernels are constant, one axis after the
other; larger blocks are summed from smaller ones. Summary tokens lie in a *lattice*: sub-cell `k_a` of cell `c_a` at
`c_a * p_a + k_a`. Tokens are `[B, *grid, heads, head_dim]`, lattices `[B, *lattice, heads, head_dim]`.
"""

from collections.abc import Iterator
from math import lcm

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, avg_pool3d, pad

from ...geometry import cell_side, subcell_counts, tiling
from ...kernels import level_kernels, start_kernels
from ..call import Call
from .cells import followed

# Block sums are taken in pieces of about this many elements.
PIECE = 1 << 20


class Aggregation:
    """The lattices of all levels, of one tensor or of several with a common memory, and their gradients.

    Each size of block is a step of plain differentiable code, from its sums to the lattices of the levels that use it
    and to the sums over larger blocks. It runs in pieces of some rows of cells, without autograd upwards and with it
    downwards.

    Args:
        tokens: `[B, *grid, kinds * heads, head_dim]`, absent ones zero.
        kinds: which of the kernels' kinds each run of heads has.
        mask: None, or bool `[B, *grid]`.
        dtype: to compute in.
    """

    def __init__(self, call: Call, tokens: Tensor, kinds: list[int], mask: Tensor | None, dtype: torch.dtype):
        self.call, self.kinds, self.dtype = call, kinds, dtype
        self.grid, self.parts = call.grid, tiling(call.options.rank, len(call.grid))
        self.mask = None if mask is None else mask[..., None, None]
        self.weights = [self._weights(level, call.kernels) for level in range(1, call.levels + 1)]
        self.sizes = [self._side(level) // w.shape[-1] for level, w in enumerate(self.weights, 1)]
        # By size of block: the levels that use it, the larger sizes summed from it, its sums.
        self.users = {size: [i + 1 for i, s in enumerate(self.sizes) if s == size] for size in sorted({1, *self.sizes})}
        self.larger: dict[int, list[int]] = {size: [] for size in self.users}
        for size in list(self.users)[1:]:
            self.larger[max(s for s in self.users if s < size and size % s == 0)].append(size)
        self.sums = {1: tokens}
        self.lattices: dict[int, Tensor] = {}
        for size in self.users:
            joined = [x[0] if len(x) == 1 else torch.cat(x, 1) for x in zip(*self._up(size), strict=True)]
            self.sums.update(zip(self.larger[size], joined, strict=False))
            self.lattices.update(zip(self.users[size], joined[len(self.larger[size]) :], strict=True))

    def _side(self, level: int) -> int:
        return cell_side(level, self.call.options.cell_size)

    def _weights(self, level: int, stacks: list[Tensor]) -> Tensor:
        """The kernels of a level, `[axes, rank, kinds * heads | 1, head_dim | 1, bins]`."""
        options, kernels = self.call.options, level_kernels(stacks, level)
        if kernels is None:
            sizes = (level, options.cell_size, options.rank, len(self.grid), 1, 1)
            start = start_kernels(*sizes, variant=options.variant, dtype=self.dtype, device=self.call.q.device)
            return start[0]
        kernels = kernels[self.kinds].to(self.dtype)
        return kernels.expand(-1, -1, -1, self.call.q.shape[1], -1, -1).movedim(0, 2).flatten(2, 3)

    def _up(self, size: int) -> Iterator[list[Tensor]]:
        for rows, x in self._pieces(size):
            yield self._step(size, rows, x, self.weights)

    def _pieces(self, size: int) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows of a size's block sums: whole cells of all that is made of them."""
        sums = self.sums[size]
        bins = [self.weights[level - 1].shape[-1] for level in self.users[size]]
        least = lcm(*bins, *(larger // size for larger in self.larger[size]))
        step = least * max(1, PIECE // max(1, least * sums[:, :1].numel()))
        for start in range(0, sums.shape[1], step):
            rows = slice(start, min(sums.shape[1], start + step))
            yield rows, sums[:, rows].to(self.dtype)

    def _step(self, size: int, rows: slice, x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        """Sums over the larger blocks, then the lattices, of a piece."""
        outputs = [_pool(x, larger // size) for larger in self.larger[size]]
        for level in self.users[size]:
            summary = _contract(x, weights[level - 1] / self._side(level))
            mask = None if self.mask is None else self.mask[:, rows.start * size : rows.stop * size].to(self.dtype)
            last = rows.stop * size >= self.grid[0]
            outputs.append(self._lattice(self._complete(summary, level, weights[level - 1].abs(), mask, last)))
        return outputs

    def _complete(self, summary: Tensor, level: int, weight: Tensor, mask: Tensor | None, last: bool) -> Tensor:
        """Scale up what cells with absent tokens give, `[rank, B, *cells, heads, head_dim]`.

        What a summary token without tokens of its own gives is 0, whatever its kernel holds.

        Args:
            weight: the kernels' absolute values.
            last: whether the grid ends with this piece.
        """
        ndim, side = len(self.grid), self._side(level)
        block = side // weight.shape[-1]
        if mask is None:
            # It separates by axis: only the last cell of an axis may be cut.
            index = torch.cartesian_prod(*[torch.arange(p) for p in self.parts]).reshape(-1, ndim)
            for axis, (extent, p) in enumerate(zip(self.grid, self.parts, strict=True)):
                if extent % side == 0 or (axis == 0 and not last):
                    continue
                start = torch.arange(0, side, block, device=weight.device)
                left = (weight[axis] * (extent % side - start).clamp(0, block)).sum(-1)
                counts = torch.tensor(subcell_counts(extent, side, p)[-p:])[index[:, axis]].to(weight.device)
                ratio = _ratio(weight[axis].sum(-1) * block, left, (left > 0) & (counts > 0)[:, None, None])
                ratio = ratio.reshape(len(ratio), *(1,) * (1 + ndim), *ratio.shape[1:])
                cells = summary.shape[2 + axis]
                whole, cut = summary.split([cells - 1, 1], 2 + axis)
                summary = torch.cat((whole, cut * ratio), 2 + axis)
            return summary
        left = _contract(_pool(mask, block), weight / side)
        whole = weight.sum(-1).prod(0) * (block / side) ** ndim
        whole = whole.reshape(len(whole), *(1,) * (1 + ndim), *whole.shape[1:])
        sizes = (level, self.call.options.cell_size, self.call.options.rank, ndim, 1, 1)
        own = start_kernels(*sizes, bins=side, dtype=self.dtype, device=mask.device)[0]
        present = (left > 0) & (_contract(mask, own) > 0)
        full = _contract(mask, torch.ones_like(own[:, :1])) == side**ndim
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

    def down(self, d_lattices: dict[int, Tensor], d_tokens: list[Tensor]) -> list[Tensor]:
        """Add the gradients of the lattices to those of the tokens; return those of the stacks of kernels.

        Args:
            d_lattices: by level, like `lattices`.
            d_tokens: of each kind, `[B, *grid, heads, head_dim]`.
        """
        weights = [w.detach().requires_grad_(bool(self.call.kernels)) for w in self.weights]
        d_weights = [torch.zeros_like(w) for w in weights]
        d_sums: dict[int, list[Tensor]] = {1: d_tokens}
        for size in reversed(self.users):
            if size > 1:
                d_sums[size] = [torch.zeros_like(self.sums[size])]
            users, larger = self.users[size], self.larger[size]
            learned = [weights[level - 1] for level in users if self.call.kernels]
            for rows, x in self._pieces(size) if users or larger else ():
                with followed():
                    x = x.detach().requires_grad_()
                    outputs = self._step(size, rows, x, weights)
                    d_outputs = [d_sums[n][0][:, rows.start * size // n : -(-rows.stop * size // n)] for n in larger]
                    for level, output in zip(users, outputs[len(larger) :], strict=True):
                        start = rows.start * size // self._side(level) * self.parts[0]
                        d_outputs.append(d_lattices[level][:, start : start + output.shape[1]])
                    d_x, *d_learned = torch.autograd.grad(outputs, [x, *learned], d_outputs)
                for level, d in zip(users, d_learned, strict=False):
                    d_weights[level - 1] += d
                for into, d in zip(d_sums[size], d_x.split(d_x.shape[-2] // len(d_sums[size]), -2), strict=True):
                    into[:, rows] += d
        if not self.call.kernels:
            return []
        with followed():
            stacks = [stack.detach().requires_grad_() for stack in self.call.kernels]
            used = [self._weights(level, stacks) for level in range(1, len(weights) + 1)]
            return list(torch.autograd.grad(used, stacks, d_weights, allow_unused=True, materialize_grads=True))


def _contract(x: Tensor, weights: Tensor) -> Tensor:
    """Sum the blocks of each cell by weight: `[B, *blocks, heads, head_dim]` to `[rank, B, *cells, heads, head_dim]`.

    Args:
        weights: `[axes, rank, heads | 1, head_dim | 1, bins]`, bins blocks a cell; blocks that lack are 0.
    """
    ndim, bins = len(weights), weights.shape[-1]
    for axis in range(ndim):
        dim = 1 + axis + (axis > 0)
        if missing := -x.shape[dim] % bins:
            x = pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, missing))
        shape = (weights.shape[1], *(1,) * (1 + ndim), *weights.shape[2:4])
        # Unbound, not indexed: the gradient of that is one tensor, not one of the whole size a bin.
        terms = zip(x.unflatten(dim, (-1, bins)).unbind(dim + 1), weights[axis].unbind(-1), strict=True)
        total = None
        for block, weight in terms:
            weight = weight.reshape(shape)
            total = block * weight if total is None else total.addcmul_(block, weight)
        x = total
    return x


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
        sums = avg_pool2d(channels.unsqueeze(2), (1, min(size, x.shape[1])), ceil_mode=True, divisor_override=1)[:, :, 0]
    return sums.movedim(1, -1).unflatten(-1, x.shape[-2:])


def _ratio(x: Tensor, left: Tensor, present: Tensor) -> Tensor:
    """`x / left` where present, else 0."""
    return torch.where(present, x / torch.where(present, left, 1), 0)
