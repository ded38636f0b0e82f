"""The kernel tensor: which weights turn a cell's tokens into its summary tokens, and for how many tokens those speak.

The kernels of one level are one tensor of densities, `[kinds, axes, rank, heads | 1, head_dim | 1, bins]`: the kinds
are key, value and, in the linear variant, query; a token at offset `o` of a cell of `s` tokens a side weighs
`w[floor(o * bins / s)] / s` on each axis. All bins 1 is the mean over the cell. Inside the library the learned levels
travel as a list of *stacks* with a levels axis in front, finest level first; a module gives one, its parameter.
Source: Kang, Tran, De Sterck, arXiv:2310.11960v4, with ragged cells added.
"""

from collections.abc import Sequence
from itertools import product
from math import log2

import torch
from torch import Tensor

from .checks import MOST_LEVELS, check_choice, check_dtype, check_positive
from .geometry import Grid, cell_side, subcell_counts, subcell_overlaps, tiling

VARIANTS = ("linear", "loglinear")


def num_kinds(variant: str) -> int:
    """Kinds of kernels: keys and values and, in the linear variant, queries."""
    return 3 if variant == "linear" else 2


def start_kernels(
    level: int,
    cell_size: int,
    rank: int,
    ndim: int,
    heads: int,
    head_dim: int,
    *,
    variant: str = "loglinear",
    bins: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """The start value of one level's kernels: the mean over each sub-cell.

    Args:
        level: 1, 2, ...; fixes the cell side `s_l = cell_size * 2**(level - 1)`.
        rank: summary tokens per cell `p`, tiled as `p_1 <= .. <= p_D`.
        ndim: number of axes `D`.
        heads, head_dim: extents of the kernels (1 to share them).
        variant: "loglinear" (kinds key and value) or "linear" (query, too).
        bins: `b`, a divisor of `s_l`; default: `cell_size` if every `p_a` divides it, else `s_l`.

    Returns:
        `[kinds, D, rank, heads, head_dim, bins]`, densities of mean 1.

    Raises:
        TypeError, ValueError: for a size that is no integer or below 1, bins that do not divide `s_l`.
    """
    sizes = dict(level=level, cell_size=cell_size, rank=rank, ndim=ndim, heads=heads, head_dim=head_dim)
    for name, value in sizes.items():
        check_positive(name, value)
    check_positive("level", level, MOST_LEVELS)
    check_dtype(dtype)
    if ndim > 3:
        raise ValueError(f"ndim must be 1, 2 or 3, got {ndim}")
    check_variant(variant)
    side, parts = cell_side(level, cell_size), tiling(rank, ndim)
    if bins is None:
        bins = side if any(cell_size % p for p in parts) else cell_size
    check_positive("bins", bins)
    if side % bins:
        raise ValueError(f"bins must divide the level's cell side {side}, got {bins}")
    device = torch.get_default_device() if device is None else device
    axes = []
    for p, k in zip(parts, zip(*product(*map(range, parts)), strict=True), strict=True):
        overlaps = subcell_overlaps(bins, p)
        axes.append([overlaps[i] for i in k])
    kernels = torch.tensor(axes, dtype=torch.float64, device="cpu").to(dtype=dtype, device=device)
    return kernels[None, :, :, None, None].expand(num_kinds(variant), -1, -1, heads, head_dim, -1).contiguous()


def check_variant(variant: str) -> None:
    """Raise TypeError or ValueError unless `variant` is one of `VARIANTS`."""
    check_choice("variant", variant, VARIANTS)


def level_kernels(stacks: Sequence[Tensor], level: int) -> Tensor | None:
    """The kernels that `level` uses: its own, else the last learned ones; None where none is learned.

    Args:
        stacks: `[levels, kinds, axes, rank, heads | 1, head_dim | 1, bins]` each, the finest levels first.

    Returns:
        A view `[kinds, axes, rank, heads | 1, head_dim | 1, bins]`.
    """
    last = None
    for stack in stacks:
        if level <= len(stack):
            return stack[level - 1]
        level -= len(stack)
        last = stack[-1] if len(stack) else last
    return last


def log_counts(
    grid: Grid,
    level: int,
    cell_size: int,
    rank: int,
    mask: Tensor | None,
    absent: float,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """`log n(C, k)` of every summary token of a level, `absent` where it speaks for no token: `[B | 1, *lattice]`.

    The lattice holds sub-cell `k_a` of cell `c_a` at `c_a * p_a + k_a` on each axis.
    """
    side, parts = cell_side(level, cell_size), tiling(rank, len(grid))
    wide = torch.float32 if torch.device(device).type == "mps" else torch.float64  # which MPS lacks
    if mask is None:
        count = torch.ones(1, dtype=wide, device=device)
        for extent, p in zip(grid, parts, strict=True):
            count = count[..., None] * torch.tensor(subcell_counts(extent, side, p), dtype=wide, device=device)
    else:
        count = mask.to(wide)
        for axis, (extent, p) in enumerate(zip(grid, parts, strict=True), 1):
            overlaps = torch.tensor(subcell_overlaps(side, p), dtype=wide, device=device)
            cells = torch.nn.functional.pad(count.movedim(axis, -1), (0, -extent % side)).unflatten(-1, (-1, side))
            count = (cells @ overlaps.T).flatten(-2).movedim(-1, axis)
    # Counts are integers in units of 1 / rank tokens.
    return torch.where(count > 0, (count / rank).log(), absent).to(dtype)


def resample_bins(bins: int, new_bins: int) -> Tensor:
    """`[new_bins, bins]`, float64: a kernel's density over other bins; rows sum to 1."""
    return torch.tensor(subcell_overlaps(bins, new_bins), dtype=torch.float64, device="cpu") / bins


def share_parts(rank: int, new_rank: int, ndim: int) -> Tensor:
    """`[new_rank, rank]`, float64: of each new sub-cell, the share that lies in each old one; rows sum to 1."""
    share = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    for old, new in zip(tiling(rank, ndim), tiling(new_rank, ndim), strict=True):
        share = torch.kron(share, torch.tensor(subcell_overlaps(old, new), dtype=torch.float64, device="cpu") / old)
    return share


def check_adaptable(stored: Sequence[int], own: Sequence[int]) -> None:
    """Raise ValueError if a stack of shape `stored` cannot be carried over to shape `own`; see `adapt_kernels`."""
    if len(stored) != len(own):
        raise ValueError(f"kernels must have {len(own)} axes, the file has shape {tuple(stored)}")
    (axes, heads, channels), (own_axes, own_heads, own_channels) = ((s[2], s[4], s[5]) for s in (stored, own))
    if (axes, channels) != (own_axes, own_channels) or heads not in (1, own_heads):
        raise ValueError(
            f"kernels of {axes} axes, {heads} heads of {channels} channels do not fit a module of {own_axes} axes, "
            f"{own_heads} heads of {own_channels} channels"
        )


def adapt_kernels(stored: Tensor, start: Tensor) -> tuple[Tensor, dict[str, str]]:
    """Stored kernels in the shape of a module's, whose start value is `start`; both are stacks.

    A level takes the stored level of the nearest side (in log2; of two, the smaller), resampled to its bins; another
    rank takes the overlap shares of the two tilings.

    Returns:
        The kernels, and what was done beyond copying, in words, under "adapted", "initialised" and "dropped".

    Raises:
        ValueError: if they cannot be carried over (other axes, heads or channels).
    """
    if stored.shape == start.shape:
        return stored, {}
    check_adaptable(stored.shape, start.shape)
    levels, kinds, axes, rank, _, _, bins = stored.shape
    new_levels, new_kinds, _, new_rank, new_heads, _, new_bins = start.shape
    notes = {}

    def nearest(level: int) -> int:
        size = log2(new_bins) + level
        return min(range(levels), key=lambda i: (abs(log2(bins) + i - size), i))

    sources = [nearest(level) for level in range(new_levels)]
    device = "cpu" if stored.device.type == "mps" else stored.device  # MPS has no float64
    kernels = stored[sources].to(device, torch.float64)
    if unused := sorted(set(range(levels)) - set(sources)):
        notes["dropped"] = f"levels {', '.join(str(i + 1) for i in unused)} of the file"
    if sources != list(range(levels)) or bins != new_bins or rank != new_rank:
        taken = ", ".join(str(i + 1) for i in sources)
        notes["adapted"] = f"from cell size {bins}, rank {rank}, levels {taken} of the file"
    if bins != new_bins:
        kernels = kernels @ resample_bins(bins, new_bins).to(kernels.device).T
    if rank != new_rank:
        kernels = torch.einsum("np,lkaphcb->lkanhcb", share_parts(rank, new_rank, axes).to(kernels.device), kernels)
    kernels = kernels.expand(-1, -1, -1, -1, new_heads, -1, -1)[:, :new_kinds].to(stored)
    if kinds > new_kinds:
        notes["dropped"] = ", ".join(filter(None, (notes.get("dropped"), "query kernels")))
    elif kinds < new_kinds:
        kernels = torch.cat((kernels, start[:, kinds:].to(kernels)), 1)
        notes["initialised"] = "query kernels"
    return kernels.contiguous(), notes
