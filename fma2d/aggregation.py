"""Learned separable aggregation: a coarse cell's tokens become its `p` summary tokens.

A kernel is one short vector an axis, a density over `b` bins of the cell. Because the density is constant in a bin, a
level works on sums over blocks of `s_l / b` tokens (`BlockSums`), so that with `b = r` bins every level costs a quarter
of the one below. Summary tokens are kept as a *lattice*: sub-cell `k_a` of cell `c_a` lies at `c_a * p_a + k_a`.

Layout here: tokens `[B, *grid, heads, head_dim]`, lattices `[B, *lattice, heads, head_dim]`, kernels of one level a
list over axes of `[p, heads | 1, head_dim | 1, b]`.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad

from .geometry import Grid, cell_side, check_positive, subcell_counts, subcell_overlaps, tiling

# Tokens are aggregated in pieces of about this many elements, which stay in a core's cache.
PIECE = 1 << 18


def start_kernels(
    level: int,
    cell_size: int,
    rank: int,
    ndim: int,
    heads: int,
    head_dim: int,
    *,
    bins: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """The start value of one level's kernels: the mean over each sub-cell.

    Args:
        level: 1, 2, ...; fixes the cell side `s_l = cell_size * 2**(level - 1)`.
        rank: summary tokens per cell `p`, tiled as `p_1 <= .. <= p_D`.
        ndim: number of axes `D`.
        heads, head_dim: extents of the kernels (1 to share them).
        bins: `b`, a divisor of `s_l`; default: `cell_size` if every `p_a` divides it, else `s_l`.

    Returns:
        A list over axes of `[rank, heads, head_dim, bins]`, each kernel of sum 1.

    Raises:
        TypeError, ValueError: for a size that is no integer or below 1, bins that do not divide `s_l`.
    """
    sizes = dict(level=level, cell_size=cell_size, rank=rank, heads=heads, head_dim=head_dim)
    for name, value in sizes.items():
        check_positive(name, value)
    if ndim not in (1, 2, 3):
        raise ValueError(f"ndim must be 1, 2 or 3, got {ndim}")
    side, parts = cell_side(level, cell_size), tiling(rank, ndim)
    if bins is None:
        bins = side if any(cell_size % p for p in parts) else cell_size
    if bins < 1 or side % bins:
        raise ValueError(f"bins must divide the level's cell side {side}, got {bins}")
    kernels = []
    for axis, k in enumerate(torch.cartesian_prod(*map(torch.arange, parts)).reshape(rank, ndim).T):
        share = torch.tensor(subcell_overlaps(bins, parts[axis]), dtype=torch.float64) / bins
        kernel = share[k].to(dtype=dtype, device=device)
        kernels.append(kernel[:, None, None, :].expand(rank, heads, head_dim, bins).contiguous())
    return kernels


def level_kernels(
    kernels: Sequence[Sequence[Tensor]], level: int, cell_size: int, rank: int, like: Tensor
) -> list[Tensor]:
    """The kernels that `level` uses: its own, else the last learned ones, else the start value (in `like`'s dtype)."""
    if kernels:
        return [kernel.to(like.dtype) for kernel in kernels[min(level, len(kernels)) - 1]]
    ndim = like.dim() - 3
    return start_kernels(level, cell_size, rank, ndim, 1, 1, dtype=like.dtype, device=like.device)


def log_counts(
    grid: Grid, level: int, cell_size: int, rank: int, mask: Tensor | None, like: Tensor, absent: float
) -> Tensor:
    """`log n(C, k)` of every summary token of a level, `absent` where it speaks for no token: `[B | 1, *lattice]`."""
    side, parts = cell_side(level, cell_size), tiling(rank, len(grid))
    if mask is None:
        count = torch.ones(1, dtype=torch.float64, device=like.device)
        for extent, p in zip(grid, parts, strict=True):
            axis = torch.tensor(subcell_counts(extent, side, p), dtype=torch.float64, device=like.device)
            count = count[..., None] * axis
    else:
        count = mask.double()
        for axis, (extent, p) in enumerate(zip(grid, parts, strict=True), 1):
            overlaps = torch.tensor(subcell_overlaps(side, p), dtype=torch.float64, device=like.device)
            cells = pad(count.movedim(axis, -1), (0, -extent % side)).unflatten(-1, (-1, side))
            count = (cells @ overlaps.T).flatten(-2).movedim(-1, axis)
    # Counts are integers in units of 1 / rank tokens.
    return torch.where(count > 0, (count / rank).log(), absent).to(like.dtype)


class BlockSums:
    """Sums of a token array over blocks of tokens, each made from the largest blocks at hand, with their backward."""

    def __init__(self, tokens: Tensor, dtype: torch.dtype):
        """`tokens`: `[B, *grid, heads, head_dim]`, absent ones zero; `dtype`: what sums are made in."""
        self._tokens = (1,) * (tokens.dim() - 3)
        self._sums = {self._tokens: tokens}
        self._made_from: dict[Grid, Grid] = {}
        self._dtype = dtype

    def __getitem__(self, block: Grid) -> Tensor:
        """Sums over blocks of `block` tokens: `[B, *ceil(grid / block), heads, head_dim]`."""
        if block not in self._sums:
            divisors = [b for b in self._sums if all(x % y == 0 for x, y in zip(block, b, strict=True))]
            source = max(divisors, key=prod)
            sizes = [x // y for x, y in zip(block, source, strict=True)]
            tokens = self._sums[source]
            step = sizes[0] * max(1, PIECE // (sizes[0] * max(1, tokens[:, :1].numel())))
            pieces = [self._sum_axes(piece, sizes) for piece in tokens.split(step, 1)]
            self._sums[block], self._made_from[block] = torch.cat(pieces, 1), source
        return self._sums[block]

    def _sum_axes(self, x: Tensor, sizes: list[int]) -> Tensor:
        for axis, size in enumerate(sizes, 1):
            if size > 1:
                x = self._sum(x, axis, size)
        return x.to(self._dtype)

    def _sum(self, x: Tensor, axis: int, size: int) -> Tensor:
        """Sum runs of `size` along an axis; the last one may be shorter."""
        whole = x.shape[axis] // size * size
        total = None
        if whole:
            first, *rest = x.narrow(axis, 0, whole).unflatten(axis, (-1, size)).unbind(axis + 1)
            total = first.to(self._dtype)
            for i, term in enumerate(rest):
                total = total + term if i == 0 else total.add_(term)
        if whole < x.shape[axis]:
            last = x.narrow(axis, whole, x.shape[axis] - whole).sum(axis, keepdim=True, dtype=self._dtype)
            total = last if total is None else torch.cat((total, last), axis)
        return total

    def backward(self, grads: dict[Grid, Tensor]) -> Tensor | None:
        """Gradient of the tokens from the gradients of the sums that were used (None where none was)."""
        grads = dict(grads)
        for block, source in reversed(self._made_from.items()):
            grad = grads.pop(block, None)
            if grad is None:
                continue
            for axis, (x, y) in enumerate(zip(block, source, strict=True), 1):
                if x != y:
                    grad = grad.repeat_interleave(x // y, axis).narrow(axis, 0, self._sums[source].shape[axis])
            grads[source] = grads[source] + grad if source in grads else grad
        return grads.get(self._tokens)


class Aggregation:
    """The aggregation of one level: block sums to summary tokens and back, with one level's kernels.

    For each channel it is a matrix product of the cells' blocks with `p` separable kernels, done piece by piece.

    Args:
        kernels: a list over axes of `[p, heads | 1, head_dim | 1, b]`, in the dtype to compute in.
        grid: token extents.
        side: `s_l`.
        mask: block sums of the mask `[B, *grid, 1, 1]`; None where every token of the grid exists.
    """

    def __init__(self, kernels: list[Tensor], grid: Grid, side: int, mask: BlockSums | None):
        self.kernels, self.grid, self.side, self.mask = kernels, grid, side, mask
        self.bins = tuple(kernel.shape[-1] for kernel in kernels)
        self.block = tuple(side // b for b in self.bins)
        self.parts = tiling(kernels[0].shape[0], len(grid))

    def forward(self, tokens: BlockSums) -> Tensor:
        """Summary tokens `[B, *lattice, heads, head_dim]`."""
        weights = self._weights(*self.kernels)
        return torch.cat([self._piece(cells, x, m, *weights) for cells, x, m in self._pieces(tokens)], 1)

    def backward(self, tokens: BlockSums, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients of `tokens[self.block]` and of the kernels from that of the summaries; recomputes in pieces."""
        weights, weights_vjp = torch.func.vjp(self._weights, *self.kernels)
        d_weights = [torch.zeros_like(w) for w in weights]
        d_sums = []
        for cells, x, m in self._pieces(tokens):
            _, vjp = torch.func.vjp(lambda x, *w, cells=cells, m=m: self._piece(cells, x, m, *w), x, *weights)
            d_x, *d_w = vjp(grad[:, cells.start * self.parts[0] : cells.stop * self.parts[0]])
            d_sums.append(d_x)
            for total, d in zip(d_weights, d_w, strict=True):
                total += d
        return torch.cat(d_sums, 1), list(weights_vjp(tuple(d_weights)))

    def _pieces(self, tokens: BlockSums):
        """Yield runs of cells along the first axis, their block sums and those of the mask."""
        x = tokens[self.block]
        cells, bins = -(-self.grid[0] // self.side), self.bins[0]
        step = max(1, PIECE // max(1, x[:, :bins].numel()))
        for start in range(0, cells, step):
            run = slice(start, min(cells, start + step))
            blocks = slice(run.start * bins, run.stop * bins)
            mask = None if self.mask is None else self.mask[self.block][:, blocks]
            yield run, x[:, blocks].to(self.kernels[0].dtype), mask

    def _weights(self, *kernels: Tensor) -> tuple[Tensor, ...]:
        """The weights of a cell's blocks, `[heads | 1, head_dim | 1, p, bins]`, and what cut cells are scaled by.

        The scale, `[*cells, heads | 1, head_dim | 1, p]`, is there where some cell is cut and no mask is given; under a
        mask it does not separate by axis and `_piece` finds it.
        """
        weights = None
        for kernel, block in zip(kernels, self.block, strict=True):
            axis = (kernel / block).permute(1, 2, 0, 3)
            weights = axis if weights is None else (weights[..., None] * axis[..., None, :]).flatten(3)
        if self.mask is not None or not any(extent % self.side for extent in self.grid):
            return (weights,)
        scale, full = None, torch.ones((), dtype=torch.bool, device=kernels[0].device)
        for kernel, extent, block in zip(kernels, self.grid, self.block, strict=True):
            size = kernel.abs().permute(1, 2, 0, 3)
            cell = torch.arange(-(-extent // self.side), device=kernel.device)
            bin_start = cell[:, None] * self.side + block * torch.arange(kernel.shape[-1], device=kernel.device)
            left = (size * (extent - bin_start).clamp(0, block)[:, None, None, None]).sum(-1)
            ratio = _ratio((size * block).sum(-1), left)
            scale = ratio if scale is None else scale.unsqueeze(-4) * ratio
            full = full[..., None] & (cell < extent // self.side)
        return weights, torch.where(full[..., None, None, None], 1, scale)

    def _piece(
        self, cells: slice, x: Tensor, mask: Tensor | None, weights: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        heads, head_dim = x.shape[-2:]
        blocks = self._cells(x)  # [heads, head_dim, B, *cells, bins]
        shape = blocks.shape[2:-1]
        full = weights.expand(heads, head_dim, -1, -1).flatten(0, 1)
        summary = torch.bmm(blocks.flatten(2, -2).flatten(0, 1), full.mT)
        summary = summary.unflatten(1, shape).unflatten(0, (heads, head_dim))
        if mask is not None:
            size = weights.abs()
            left = self._cells(mask).flatten(0, -2) @ size.flatten(0, 2).mT
            left = left.unflatten(1, size.shape[:3]).unflatten(0, shape).movedim((-3, -2), (0, 1))
            whole = (size.sum(-1) * prod(self.block)).reshape(*size.shape[:2], *(1,) * len(shape), -1)
            full = self._cells(mask).sum(-1, keepdim=True) == self.side ** len(self.grid)
            summary = summary * torch.where(full, 1, _ratio(whole, left))
        elif scale is not None:
            summary = summary * scale[cells].movedim((-3, -2), (0, 1)).unsqueeze(2)
        return self._lattice(summary)

    def _cells(self, x: Tensor) -> Tensor:
        """Blocks by cell, channels first: `[B, *blocks, heads, head_dim]` to `[heads, head_dim, B, *cells, bins]`."""
        ndim = len(self.grid)
        padding = [p for n, b in zip(x.shape[ndim:0:-1], self.bins[::-1], strict=True) for p in (0, -n % b)]
        if any(padding):
            x = pad(x, (0, 0, 0, 0, *padding))
        for axis, bins in enumerate(self.bins):
            x = x.unflatten(1 + 2 * axis, (-1, bins))
        cell_axes, bin_axes = range(1, 1 + 2 * ndim, 2), range(2, 2 + 2 * ndim, 2)
        return x.permute(-2, -1, 0, *cell_axes, *bin_axes).flatten(-ndim)

    def _lattice(self, summary: Tensor) -> Tensor:
        """`[heads, head_dim, B, *cells, p]` to `[B, *lattice, heads, head_dim]`."""
        ndim = len(self.grid)
        summary = summary.unflatten(-1, self.parts)
        order = [axis for a in range(ndim) for axis in (3 + a, 3 + ndim + a)]
        summary = summary.permute(2, *order, 0, 1)
        for axis in range(1, 1 + ndim):
            summary = summary.flatten(axis, axis + 1)
        return summary


def _ratio(whole: Tensor, left: Tensor) -> Tensor:
    """`whole / left`, and 0 where nothing is left."""
    return torch.where(left > 0, whole / torch.where(left > 0, left, 1), 0)
