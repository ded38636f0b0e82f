"""The attention layer of the text models: fast multipole attention, or what it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import num_levels
from ..modules import FMA1d

if TYPE_CHECKING:
    from .cache import LayerCache

KINDS = ("fma", "fma-linear", "mean", "full", "local")
LEARNED = ("fma", "fma-linear")
LONGEST = 10000.0  # of the turns' periods, in tokens over two pi


class Attention(FMA1d):
    """Attention of a chosen kind between tokens whose queries and keys are turned by their positions.

    A turned query times a turned key depends on their distance only (rotary positions, Su et al., arXiv:2104.09864). A
    summary token is a weighted sum of turned keys, in which turns of a period shorter than the cell cancel.

    Args:
        dim, num_heads: as in `FMA1d`; `dim / num_heads` is even.
        kind: "fma" (learned kernels), "fma-linear" (the far queries aggregated too; not causal), "mean" (FMA with fixed
            averaging), "full" (dense), "local" (the near field of FMA alone).
        causal: a token attends to nothing on its right.
        cell_size, rank: of the FMA kinds; "local" takes the cell size.
        context: the length for which every level gets kernels of its own; any length runs.
        count_bias: of the FMA kinds, see `fma2d.multipole_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kind: str = "fma",
        *,
        causal: bool,
        cell_size: int,
        rank: int,
        context: int,
        count_bias: bool = True,
    ):
        if kind not in KINDS:
            raise ValueError(f"attention must be one of {KINDS}, got {kind!r}")
        if causal and kind == "fma-linear":
            raise ValueError("attention 'fma-linear' is bidirectional: its summary queries would hold later tokens")
        options = dict(causal=causal, count_bias=count_bias, variant="linear" if kind == "fma-linear" else "loglinear")
        options |= dict(aggregation="learned" if kind in LEARNED else "mean")
        options |= dict(levels=num_levels((context,), cell_size) if kind in LEARNED else 0)
        super().__init__(dim, num_heads, cell_size, rank, **options)
        if self.head_dim % 2:
            raise ValueError(f"positions turn channels in pairs: dim / num_heads must be even, got {dim}/{num_heads}")
        self.kind = kind

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: LayerCache | None = None) -> Tensor:
        """`[B, N, dim]` to the same.

        Args:
            key_mask: bool `[B, N]`, True where a token exists, in each row the first ones.
            cache: this layer's, in a model's `Cache`: x then goes on where it ends.
        """
        q, k, v = self.project(x, cache)
        out = self.attend(q, k, v, key_mask) if cache is None else cache.extend(q, k, v, key_mask)
        return self.merge(out)

    def project(self, x: Tensor, cache: LayerCache | None = None) -> tuple[Tensor, ...]:
        """q, k and v `[B, heads, N, head_dim]` of x `[B, N, dim]`, q and k turned by their positions."""
        q, k, v = super().project(x)
        positions = torch.arange(x.shape[1], device=x.device)[None]
        if cache is not None:
            positions = positions + cache.offset()
        return rotate(q, positions), rotate(k, positions), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.kind not in ("full", "local"):
            return super().attend(q, k, v, key_mask)
        if self.causal:
            key_mask = None  # absent tokens are on the right, where no causal query looks
        elif key_mask is not None:
            v = torch.where(key_mask[:, None, :, None], v, 0)
        if self.kind == "local":
            return self._attend_near(q, k, v, key_mask)
        if key_mask is not None:  # a softmax over nothing would be NaN
            key_mask = (key_mask | ~key_mask.any(1, keepdim=True))[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, key_mask, is_causal=self.causal)

    def _attend_near(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Every cell is a row of a batch, and attends to itself and the cells beside it (causal: the one before)."""
        (batch, _, tokens, _), cell = q.shape, self.cell_size
        sides = (-1, 0) if self.causal else (-1, 0, 1)

        def cells(x: Tensor) -> Tensor:
            """`[B, heads, N, C]` to `[B, cells, heads, cell, C]`."""
            return F.pad(x, (0, 0, 0, -tokens % cell)).unflatten(2, (-1, cell)).transpose(1, 2)

        def near(x: Tensor) -> Tensor:
            """The same to `[B, cells, heads, len(sides) * cell, C]`."""
            padded = F.pad(cells(x), (0, 0, 0, 0, 0, 0, 1, 1))
            return torch.cat([padded[:, 1 + side : padded.shape[1] - 1 + side] for side in sides], 3)

        exists = torch.ones(batch, tokens, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
        seen = near(exists[:, None, :, None]).mT
        seen = seen | ~seen.any(-1, keepdim=True)  # a softmax over nothing would be NaN; the values are zeros
        if self.causal:
            seen = seen & torch.ones(cell, 2 * cell, dtype=torch.bool, device=q.device).tril(cell)
        rows = [x.flatten(0, 1) for x in (cells(q), near(k), near(v), seen.expand(-1, -1, -1, cell, -1))]
        out = F.scaled_dot_product_attention(*rows).unflatten(0, (batch, -1))
        return out.transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """x `[B, heads, N, head_dim]`, its channels turned in pairs by angles in proportion to positions `[B | 1, N]`."""
    half = x.shape[-1] // 2
    frequencies = LONGEST ** -(torch.arange(half, dtype=torch.float32, device=x.device) / half)
    phase = positions[:, None, :, None] * frequencies
    cos, sin = phase.cos().to(x.dtype), phase.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
