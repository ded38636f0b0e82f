"""q, k and v at every level, and the way back from their gradients to the tokens and the kernels.

What lies side by side in memory, as a fused projection leaves q, k and v, is aggregated as one tensor of more heads:
nothing is copied then, and there are fewer and larger operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..aggregation import Aggregation, BlockSums, level_kernels, spread
from ..geometry import Grid, cell_side, num_levels
from .cells import is_followed
from .options import Kernels, Options


def sources(
    tokens: list[Tensor],
    kernels: list[Kernels | None],
    options: Options,
    exist_sums: BlockSums,
    masked: bool,
    dtype: torch.dtype,
) -> list[Source]:
    """Sources of all of q, k and v; those that lie side by side in memory are one.

    Args:
        tokens: q, k, v `[B, *grid, heads, head_dim]`, absent ones zero.
        kernels: those of each, None for queries that are not aggregated.
        exist_sums: block sums of the mask.
        masked: whether there is a mask.
        dtype: what to compute in.
    """
    aggregated = [i for i in (0, 1) if kernels[i] is not None]
    first = next((i for i in aggregated if _side_by_side(tokens[i:], kernels[i:])), 2)
    groups = [*(slice(i, i + 1) for i in range(first)), slice(first, 3)]
    return [Source(tokens[group], kernels[group], options, exist_sums, masked, dtype) for group in groups]


def _side_by_side(tokens: list[Tensor], kernels: list[Kernels]) -> bool:
    """Whether tensors, and what they are aggregated with, can be taken as one of more heads."""
    if is_followed():  # as one they would be functions of the first tensor only
        return False
    first, heads = tokens[0], tokens[0].shape[-2]
    shapes = [[[w.shape for w in axes] for axes in levels] for levels in kernels]
    if any(other != shapes[0] for other in shapes) or any(w[1] != heads for axes in shapes[0] for w in axes):
        return False
    return all(
        x.stride() == first.stride()
        and x.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and x.storage_offset() == first.storage_offset() + i * heads * first.stride(-2)
        for i, x in enumerate(tokens)
    )


class Source:
    """Some of q, k and v at every level: their tokens at 0, else their summary tokens; and the way back.

    Several are aggregated as one tensor, heads side by side. Without kernels (`None`: q in the log-linear variant) it
    is the tokens at every level.
    """

    def __init__(
        self,
        tokens: list[Tensor],
        kernels: list[Kernels | None],
        options: Options,
        exist_sums: BlockSums,
        masked: bool,
        dtype: torch.dtype,
    ):
        self.tokens, self.kernels, self.options = tokens, kernels, options
        self.exist_sums, self.masked, self.dtype = exist_sums, masked, dtype
        *shape, self.heads, head_dim = tokens[0].shape
        self.grid = torch.Size(shape[1:])
        self.together = tokens[0]
        if len(tokens) > 1:
            self.together = tokens[0].as_strided((*shape, len(tokens) * self.heads, head_dim), tokens[0].stride())
        self.sums = BlockSums(self.together, dtype)
        self.d_sums: dict[Grid, list[Tensor]] = {}
        self._buffer: Tensor | None = None
        self.d_kernels = [
            [[torch.zeros_like(w, dtype=dtype) for w in level] for level in levels or []] for levels in kernels
        ]
        # Upwards, as block sums are made from smaller ones.
        levels = [] if kernels[0] is None else range(1, num_levels(self.grid, options.cell_size) + 1)
        self._lattices = [self._aggregation(level).forward(self.sums) for level in levels]

    def at(self, level: int) -> Sequence[Tensor]:
        if level == 0 or not self._lattices:
            return self.tokens
        return self._lattices[level - 1].split(self.heads, -2)

    def _aggregation(self, level: int) -> Aggregation:
        options = self.options
        like = self.together.new_empty((), dtype=self.dtype).expand(self.together.shape)
        own = [level_kernels(kernels, level, options.cell_size, options.rank, like) for kernels in self.kernels]
        together = own[0]
        if len(own) > 1 and self.kernels[0]:
            together = [torch.cat(axes, 1) for axes in zip(*own, strict=True)]
        side = cell_side(level, options.cell_size)
        cut = self.masked or any(extent % side for extent in self.grid)
        return Aggregation(together, self.grid, side, self.exist_sums if cut else None)

    def buffers(self, level: int) -> Sequence[Tensor]:
        """Where the gradients of `at(level)` are to be added."""
        if level == 0 or not self._lattices:
            return self._grads(self.sums.tokens)
        self._buffer = torch.zeros_like(self._lattices[level - 1])
        return self._buffer.split(self.heads, -2)

    def collect(self, level: int) -> None:
        """Take what is in the buffers on to the kernels and the block sums."""
        if level == 0 or not self._lattices:
            return
        aggregation = self._aggregation(level)
        d_kernels = aggregation.backward(self.sums, self._buffer, self._grads(aggregation.block))
        for i, totals in enumerate(self.d_kernels):
            for axis, total in enumerate(totals[min(level, len(totals)) - 1] if totals else []):
                d = d_kernels[axis]
                total += d.narrow(1, i * self.heads, self.heads) if len(self.tokens) > 1 else d

    def _grads(self, block: Grid) -> list[Tensor]:
        """Where the gradients of sums over blocks are gathered, one for each of the tensors."""
        if block not in self.d_sums:
            shape = self.sums[block].shape[:-2]
            self.d_sums[block] = [x.new_zeros(*shape, *x.shape[-2:], dtype=self.dtype) for x in self.tokens]
        return self.d_sums[block]

    def kernel_grads(self) -> list[Kernels]:
        """The gradients of each tensor's kernels."""
        grads = []
        for kernels, totals in zip(self.kernels, self.d_kernels, strict=True):
            pairs = zip(totals, kernels or [], strict=True)
            grads.append([[d.to(w.dtype) for d, w in zip(*level, strict=True)] for level in pairs])
        return grads

    def token_grads(self) -> list[Tensor]:
        for block, smaller in self.sums.made():
            if block in self.d_sums:
                for grad, into in zip(self.d_sums.pop(block), self._grads(smaller), strict=True):
                    spread(grad, block, into, smaller)
        return self._grads(self.sums.tokens)
