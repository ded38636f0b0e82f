"""Learned kernels from one setting to another: other levels, cell size, rank, variant, shared heads.

This is the one place for the rule. Modules apply it whenever a state dict is loaded, so it holds on every road (timm,
mmseg, resume, plain torch), and needs nothing but the shape of what was stored.
"""

from math import log2

import torch
from torch import Tensor

from .geometry import subcell_overlaps, tiling


def resample_bins(bins: int, new_bins: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[new_bins, bins]`: integrates a kernel's density over other bins; columns sum to 1."""
    return torch.tensor(subcell_overlaps(bins, new_bins), dtype=dtype) / new_bins


def share_parts(rank: int, new_rank: int, ndim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`[new_rank, rank]`: of each new sub-cell, the share that lies in each old one; rows sum to 1."""
    share = torch.ones(1, 1, dtype=dtype)
    for old, new in zip(tiling(rank, ndim), tiling(new_rank, ndim), strict=True):
        share = torch.kron(share, torch.tensor(subcell_overlaps(old, new), dtype=dtype) / old)
    return share


def adapt_kernels(stored: Tensor, start: Tensor) -> tuple[Tensor, dict[str, str]]:
    """Stored kernels in the shape of a module's, whose start value is `start`.

    Args:
        stored, start: `[levels, kinds, axes, rank, heads | 1, head_dim, bins]`, densities; the kinds are key, value
            and, in the linear variant, query.

    Returns:
        The kernels, and what was done beyond copying, in words, under "adapted", "initialised" and "dropped".

    Raises:
        ValueError: if they cannot be carried over (other axes, heads or channels).
    """
    if stored.shape == start.shape:
        return stored, {}
    if stored.dim() != start.dim():
        raise ValueError(f"kernels must have {start.dim()} axes, the file has shape {tuple(stored.shape)}")
    levels, kinds, axes, rank, heads, head_dim, bins = stored.shape
    new_levels, new_kinds, new_axes, new_rank, new_heads, new_head_dim, new_bins = start.shape
    if (axes, head_dim) != (new_axes, new_head_dim) or heads not in (1, new_heads):
        raise ValueError(
            f"kernels of {axes} axes, {heads} heads of {head_dim} channels do not fit a module of {new_axes} axes, "
            f"{new_heads} heads of {new_head_dim} channels"
        )
    notes = {}

    def nearest(level: int) -> int:
        size = log2(new_bins) + level
        return min(range(levels), key=lambda i: (abs(log2(bins) + i - size), i))

    sources = [nearest(level) for level in range(new_levels)]
    kernels = stored[sources].to(torch.float64)
    if unused := sorted(set(range(levels)) - set(sources)):
        notes["dropped"] = f"levels {', '.join(str(i + 1) for i in unused)} of the file"
    if sources != list(range(levels)) or bins != new_bins or rank != new_rank:
        taken = ", ".join(str(i + 1) for i in sources)
        notes["adapted"] = f"from cell size {bins}, rank {rank}, levels {taken} of the file"
    if bins != new_bins:
        kernels = kernels @ (new_bins / bins * resample_bins(bins, new_bins)).to(kernels.device).T
    if rank != new_rank:
        share = share_parts(rank, new_rank, axes).to(kernels.device)
        kernels = torch.einsum("np,lkaphcb->lkanhcb", share, kernels)
    kernels = kernels.expand(-1, -1, -1, -1, new_heads, -1, -1)[:, :new_kinds].to(stored.dtype)
    if kinds > new_kinds:
        notes["dropped"] = ", ".join(filter(None, (notes.get("dropped"), "query kernels")))
    elif kinds < new_kinds:
        kernels = torch.cat((kernels, start[:, kinds:].to(kernels)), 1)
        notes["initialised"] = "query kernels"
    return kernels.contiguous(), notes
