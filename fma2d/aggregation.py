"""Learned separable aggregation: a coarse cell's tokens become its `p` summary tokens.

A kernel is one short vector an axis, a density over `b` bins of the cell. Because the density is constant in a bin, a
level works on sums over blocks of `s_l / b` tokens (`BlockSums`), so that with `b = r` bins every level costs a quarter
of the one below. Summary tokens are kept as a *lattice*: sub-cell `k_a` of cell `c_a` lies at `c_a * p_a + k_a`.

Layout here: tokens `[B, *grid, heads, head_dim]`, lattices `[B, *lattice, heads, head_dim]`, kernels of one level a
list over axes of `[p, heads | 1, head_dim | 1, b]`.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .geometry import Grid, cell_side, check_positive, subcell_counts, subcell_overlaps, tiling

# Tokens that have to be copied first are aggregated in pieces of about this many elements, so that temporaries do not
# grow with the grid.
PIECE = 1 << 19


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
    sizes = dict(level=level, cell_size=cell_size, rank=rank, ndim=ndim, heads=heads, head_dim=head_dim)
    for name, value in sizes.items():
        check_positive(name, value)
    if ndim > 3:
        raise ValueError(f"ndim must be 1, 2 or 3, got {ndim}")
    side, parts = cell_side(level, cell_size), tiling(rank, ndim)
    if bins is None:
        bins = side if any(cell_size % p for p in parts) else cell_size
    check_positive("bins", bins)
    if side % bins:
        raise ValueError(f"bins must divide the level's cell side {side}, got {bins}")
    device = torch.get_default_device() if device is None else device
    kernels = []
    for axis, k in enumerate(zip(*product(*map(range, parts)), strict=True)):
        share = torch.tensor(subcell_overlaps(bins, parts[axis]), dtype=torch.float64, device="cpu") / bins
        kernel = share[list(k)].to(dtype=dtype, device=device)
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
    wide = torch.float32 if like.device.type == "mps" else torch.float64  # which MPS lacks
    if mask is None:
        count = torch.ones(1, dtype=wide, device=like.device)
        for extent, p in zip(grid, parts, strict=True):
            axis = torch.tensor(subcell_counts(extent, side, p), dtype=wide, device=like.device)
            count = count[..., None] * axis
    else:
        count = mask.to(wide)
        for axis, (extent, p) in enumerate(zip(grid, parts, strict=True), 1):
            overlaps = torch.tensor(subcell_overlaps(side, p), dtype=wide, device=like.device)
            cells = F.pad(count.movedim(axis, -1), (0, -extent % side)).unflatten(-1, (-1, side))
            count = (cells @ overlaps.T).flatten(-2).movedim(-1, axis)
    # Counts are integers in units of 1 / rank tokens.
    return torch.where(count > 0, (count / rank).log(), absent).to(like.dtype)


class BlockSums:
    """Sums of a token array over blocks of tokens, each made from the largest blocks at hand."""

    def __init__(self, tokens: Tensor, dtype: torch.dtype):
        """`tokens`: `[B, *grid, heads, head_dim]`, absent ones zero; `dtype`: what sums are made in."""
        self.tokens: Grid = (1,) * (tokens.dim() - 3)
        self._sums = {self.tokens: tokens}
        self._made_from: dict[Grid, Grid] = {}
        self._dtype = dtype

    def __getitem__(self, block: Grid) -> Tensor:
        """Sums over blocks of `block` tokens: `[B, *ceil(grid / block), heads, head_dim]`."""
        if block not in self._sums:
            divisors = [b for b in self._sums if all(x % y == 0 for x, y in zip(block, b, strict=True))]
            source = max(divisors, key=prod)
            sizes = [x // y for x, y in zip(block, source, strict=True)]
            tokens = self._sums[source]
            step = _rows_at_once(tokens, self._dtype, sizes[0])
            pieces = [self._pool(piece.to(self._dtype), sizes) for piece in tokens.split(step, 1)]
            self._sums[block], self._made_from[block] = _join(pieces), source
        return self._sums[block]

    @staticmethod
    def _pool(x: Tensor, sizes: list[int]) -> Tensor:
        pool = F.avg_pool3d if len(sizes) == 3 else F.avg_pool2d
        sizes = [min(size, n) for size, n in zip(sizes, x.shape[1:], strict=False)]  # pooling asks for that
        sums = pool(_channels_first(x), _planar(sizes), ceil_mode=True, divisor_override=1)
        return _channels_last(sums, x)

    def made(self) -> Iterator[tuple[Grid, Grid]]:
        """Yield each block and the smaller one that its sums were made from, the last made first."""
        yield from reversed(self._made_from.items())


def spread(grad: Tensor, block: Grid, into: Tensor, smaller: Grid) -> None:
    """Add the gradient of sums over a block to that of the sums over a smaller block, of which they were made.

    In place, part by part: a gradient enlarged first would be fresh memory, which costs more than the sums do.
    """
    sizes = [x // y for x, y in zip(block, smaller, strict=True)]
    for offset in product(*map(range, sizes)):
        part = into[(slice(None), *(slice(o, None, f) for o, f in zip(offset, sizes, strict=True)))]
        part += grad[tuple(map(slice, part.shape[:-2]))]


class Aggregation:
    """The aggregation of one level: block sums to summary tokens and back, with one level's kernels.

    As one weight for each block and channel of a cell, a kernel is a depthwise convolution whose stride is its size.

    Args:
        kernels: a list over axes of `[p, heads | 1, head_dim | 1, b]`, in the dtype to compute in.
        grid: token extents.
        side: `s_l`.
        exist: block sums of the mask, `[B | 1, *grid, 1, 1]`; None where every cell is whole.
    """

    def __init__(self, kernels: list[Tensor], grid: Grid, side: int, exist: BlockSums | None):
        self.grid, self.side, self.exist = grid, side, exist
        self.bins = tuple(kernel.shape[-1] for kernel in kernels)
        self.block = tuple(side // b for b in self.bins)
        self.parts = tiling(kernels[0].shape[0], len(grid))
        # Of the blocks along one axis, and of all blocks: `[p, heads | 1, head_dim | 1, *bins]`.
        self.factors = [
            (kernel / block).unflatten(-1, [b if a == axis else 1 for a, b in enumerate(self.bins)])
            for axis, (kernel, block) in enumerate(zip(kernels, self.block, strict=True))
        ]
        self.weight = prod(self.factors)

    def forward(self, tokens: BlockSums) -> Tensor:
        """Summary tokens `[B, *lattice, heads, head_dim]`."""
        pieces = []
        for _, x, exist in self._pieces(tokens):
            summary = self._convolve(x)
            if exist is not None:
                whole, left, full = self._existence(exist)
                summary = torch.where(full, summary, _ratio(summary, left) * whole)
            pieces.append(self._lattice(summary))
        return _join(pieces)

    def backward(self, tokens: BlockSums, grad: Tensor, d_sums: list[Tensor]) -> list[Tensor]:
        """Gradients of the kernels from that of the summaries; recomputes in pieces.

        That of `tokens[self.block]` is added to `d_sums`, tensors which share the heads among them.
        """
        d_weight, heads = torch.zeros_like(self.weight), [x.shape[-2] for x in d_sums]
        for cells, x, exist in self._pieces(tokens, copied=True):
            d = self._cells(grad[:, cells.start * self.parts[0] : cells.stop * self.parts[0]])
            if exist is not None:
                whole, left, full = self._existence(exist)
                # Not inf, which times the 0 that comes from a summary of no token would be NaN.
                scale = _ratio(whole, left).clamp(max=torch.finfo(x.dtype).max)
                d_whole = (d * _ratio(self._convolve(x), left)).masked_fill(full, 0).sum_to_size(scale.shape)
                d_weight += self._existence_backward(exist, d_whole, d_whole * scale)
                d = torch.where(full, d, d * scale)
            d_x, d_w = self._convolve_backward(x, d)
            d_weight += d_w.sum_to_size(d_weight.shape)
            for into, part in zip(d_sums, d_x.split(heads, -2), strict=True):
                into[:, cells.start * self.bins[0] : cells.stop * self.bins[0]] += part
        return self._kernel_grads(d_weight)

    def _pieces(self, tokens: BlockSums, copied: bool = False) -> Iterator[tuple[range, Tensor, Tensor | None]]:
        """Yield runs of cells along the first axis, their block sums and those of the mask.

        `copied`: temporaries as large as the block sums will be made of them.
        """
        x = tokens[self.block]
        cells, bins = -(-self.grid[0] // self.side), self.bins[0]
        step = _rows_at_once(x, self.weight.dtype, bins, copied or any(self._padding(x))) // bins
        for start in range(0, cells, step):
            run = range(start, min(cells, start + step))
            blocks = slice(run.start * bins, run.stop * bins)
            exist = None if self.exist is None else self.exist[self.block][:, blocks]
            # Contiguous once, or each convolution makes it so.
            yield run, x[:, blocks].to(self.weight.dtype).contiguous(), exist

    def _convolve(self, x: Tensor) -> Tensor:
        """Block sums `[B, *blocks, heads, head_dim]` to `[p, B, *cells, heads, head_dim]`."""
        conv = F.conv3d if len(self.bins) == 3 else F.conv2d
        tokens = _channels_first(self._pad(x))
        weights = self._depthwise(x)
        return torch.stack([_channels_last(conv(tokens, w, stride=w.shape[2:], groups=len(w)), x) for w in weights])

    def _convolve_backward(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the block sums and of the weight, `[p, heads, head_dim, *bins]`."""
        deconv = F.conv_transpose3d if len(self.bins) == 3 else F.conv_transpose2d
        d_x = None
        for d_part, w in zip(d, self._depthwise(x), strict=True):
            term = deconv(_channels_first(d_part), w, stride=w.shape[2:], groups=len(w))
            d_x = term if d_x is None else d_x.add_(term)
        d_x = _channels_last(d_x, x)[tuple(map(slice, x.shape[:-2]))]
        d_w = d.flatten(1, -3).movedim((0, 1), (2, 3)).flatten(0, 1) @ self._blocks(x).flatten(0, 1)
        return d_x, d_w.unflatten(0, x.shape[-2:]).movedim(2, 0).unflatten(-1, self.bins)

    def _depthwise(self, x: Tensor) -> Tensor:
        """Weights as those of `p` convolutions: `[p, heads * head_dim, 1, *bins]`."""
        weight = self.weight.expand(-1, *x.shape[-2:], *self.bins).flatten(1, 2)
        return weight.reshape(*weight.shape[:2], 1, *_planar(self.bins))

    def _existence(self, exist: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The whole weight of a cell, what existing tokens leave of it, and whether all of the cell's tokens exist.

        Each is `[p | 1, B | 1, *cells | 1, heads | 1, head_dim | 1]`. What a cell that is not full gives is scaled by
        `whole / left`; the sum is divided first, so that a small rest of the weight makes no inf.
        """
        blocks, size = self._blocks(exist)[0, 0], self.weight.abs()
        cells = (exist.shape[0], *(-(-n // b) for n, b in zip(exist.shape[1:], self.bins, strict=False)))
        left = (size.flatten(3) @ blocks.mT).movedim(-1, 1).unflatten(1, cells)
        full = (blocks.sum(-1) == self.side ** len(self.grid)).unflatten(0, cells)[None, ..., None, None]
        return self._whole(size), left, full

    def _existence_backward(self, exist: Tensor, d_whole: Tensor, d_lost: Tensor) -> Tensor:
        """The gradient of the weight from that of the whole weight, and from the negative of that of what is left."""
        d_lost = d_lost.flatten(1, -3).movedim(1, -1)
        d_size = (-d_lost @ self._blocks(exist)[0, 0]).unflatten(-1, self.bins)
        d_whole = d_whole.sum(list(range(1, d_whole.dim() - 2)))
        d_size = d_size + d_whole.reshape(*d_whole.shape, *(1,) * len(self.bins)) * prod(self.block)
        return self.weight.sign() * d_size

    def _whole(self, size: Tensor) -> Tensor:
        """The weights' size over all tokens of a cell, `[p, 1, *1, heads | 1, head_dim | 1]`."""
        whole = size.flatten(3).sum(-1) * prod(self.block)
        return whole.reshape(len(whole), *(1,) * (1 + len(self.bins)), *whole.shape[1:])

    def _kernel_grads(self, d_weight: Tensor) -> list[Tensor]:
        grads = []
        for axis, (factor, block) in enumerate(zip(self.factors, self.block, strict=True)):
            others = prod(f for a, f in enumerate(self.factors) if a != axis)
            grads.append((d_weight * others / block).sum_to_size(factor.shape).flatten(3))
        return grads

    def _padding(self, x: Tensor) -> list[int]:
        return [-n % b for n, b in zip(x.shape[1:], self.bins, strict=False)]

    def _pad(self, x: Tensor) -> Tensor:
        """Fill up the last cells of `[B, *blocks, heads, head_dim]` with zeros."""
        padding = self._padding(x)
        return F.pad(x, (0, 0, 0, 0, *(p for n in reversed(padding) for p in (0, n)))) if any(padding) else x

    def _blocks(self, x: Tensor) -> Tensor:
        """Block sums by cell, channels first: `[heads, head_dim, B * cells, bins of all axes]`."""
        x, ndim = self._pad(x), len(self.bins)
        for axis, bins in enumerate(self.bins):
            x = x.unflatten(1 + 2 * axis, (-1, bins))
        x = x.permute(-2, -1, 0, *range(1, 1 + 2 * ndim, 2), *range(2, 2 + 2 * ndim, 2))
        return x.flatten(-ndim).flatten(2, -2)

    def _cells(self, lattice: Tensor) -> Tensor:
        """`[B, *lattice, heads, head_dim]` to `[p, B, *cells, heads, head_dim]`."""
        ndim = len(self.bins)
        for axis, p in enumerate(self.parts):
            lattice = lattice.unflatten(1 + 2 * axis, (-1, p))
        lattice = lattice.permute(*range(2, 2 + 2 * ndim, 2), 0, *range(1, 1 + 2 * ndim, 2), -2, -1)
        return lattice.flatten(0, ndim - 1)

    def _lattice(self, summary: Tensor) -> Tensor:
        """`[p, B, *cells, heads, head_dim]` to `[B, *lattice, heads, head_dim]`."""
        ndim = len(self.bins)
        summary = summary.unflatten(0, self.parts)
        summary = summary.permute(ndim, *(d for axis in range(ndim) for d in (ndim + 1 + axis, axis)), -2, -1)
        for axis in range(1, 1 + ndim):
            summary = summary.flatten(axis, axis + 1)
        return summary


def _ratio(x: Tensor, left: Tensor) -> Tensor:
    """`x / left`, and 0 where nothing is left."""
    return torch.where(left > 0, x / torch.where(left > 0, left, 1), 0)


def _rows_at_once(x: Tensor, dtype: torch.dtype, multiple: int, copied: bool = False) -> int:
    """How much of the first axis of `[B, *grid, heads, head_dim]` makes a piece: all where nothing is copied."""
    if x.is_contiguous() and x.dtype == dtype and not copied:
        return -(-x.shape[1] // multiple) * multiple
    return multiple * max(1, PIECE // max(1, x[:, :multiple].numel()))


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _planar(sizes: Sequence[int]) -> list[int]:
    """Sizes for convolution and pooling, which want two axes at least."""
    return [1, *sizes] if len(sizes) == 1 else list(sizes)


def _channels_first(x: Tensor) -> Tensor:
    """`[B, *grid, heads, head_dim]` as convolution and pooling want it, `[B, channels, *grid]`, in place."""
    x = x.flatten(-2)
    return (x.unsqueeze(1) if x.dim() == 3 else x).movedim(-1, 1)


def _channels_last(x: Tensor, like: Tensor) -> Tensor:
    """The way back of `_channels_first`; `like` tells the axes, heads and head_dim."""
    x = x.movedim(1, -1)
    return (x if like.dim() > 4 else x.squeeze(1)).unflatten(-1, like.shape[-2:])
