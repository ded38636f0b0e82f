"""Attention layers of the text models, `[B, N, dim]` to the same: fast multipole, and others for comparison.

All have the same projections and the same call, `layer(x, key_mask=None, cache=None)`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..geometry import num_levels
from ..modules import FMA1d
from .cache import Cache, KeyValueCache, MultipoleCache
from .positions import rotate

ATTENTIONS = ("fma", "fma-linear", "mean", "full", "local")


def make_attention(
    attention: str,
    dim: int,
    num_heads: int,
    *,
    causal: bool,
    cell_size: int,
    rank: int,
    context: int,
    share_heads: bool,
    rotary: bool,
    count_bias: bool,
    dropout: float,
    backend: str,
) -> nn.Module:
    """A layer by name: see `fma2d.text.CausalLM`.

    Raises:
        TypeError, ValueError: for settings that no layer can have; the message names the setting.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {attention!r}")
    if causal and attention == "fma-linear":
        raise ValueError("attention 'fma-linear' is bidirectional: its summary queries would hold later tokens")
    if rotary and dim // num_heads % 2:
        raise ValueError(
            f"rotary positions turn channels in pairs: dim / num_heads must be even, got {dim}/{num_heads}"
        )
    shared = dict(causal=causal, rotary=rotary, proj_drop=dropout)
    if attention == "full":
        return FullAttention(dim, num_heads, **shared)
    if attention == "local":
        return LocalAttention(dim, num_heads, cell_size, **shared)
    return MultipoleAttention(
        dim,
        num_heads,
        cell_size,
        rank,
        levels=num_levels((context,), cell_size),
        variant="linear" if attention == "fma-linear" else "loglinear",
        aggregation="mean" if attention == "mean" else "learned",
        share_heads=share_heads,
        count_bias=count_bias,
        backend=backend,
        **shared,
    )


def _rotated(q: Tensor, k: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor]:
    positions = torch.arange(q.shape[2], device=q.device)[None]
    if cache is not None and cache.lengths is not None:
        positions = positions + cache.lengths[:, None]
    return rotate(q, positions), rotate(k, positions)


class MultipoleAttention(FMA1d):
    """`FMA1d`, with rotary positions if asked.

    Args:
        rotary: turn queries and keys by their positions first. What a summary token keeps of its keys' positions is
            their mean, so a turn tells positions apart only where its period is longer than the cell.
        The others as in `FMA1d`.
    """

    def __init__(self, *args, rotary: bool, **settings):
        super().__init__(*args, **settings)
        self.rotary = rotary

    def project(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, ...]:
        """q, k and v `[B, heads, N, head_dim]` of x `[B, N, dim]`, q and k turned by their positions."""
        q, k, v = super().project(x)
        return *(_rotated(q, k, cache) if self.rotary else (q, k)), v

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return self.merge(self.attend(*self.project(x, cache), key_mask, cache))

    def new_cache(self) -> MultipoleCache:
        return MultipoleCache.of(self)


class FullAttention(nn.Module):
    """Softmax attention of every token to every token, causal or not; the parameters of `FMA1d` without kernels."""

    def __init__(self, dim: int, num_heads: int, *, causal: bool, rotary: bool, proj_drop: float):
        super().__init__()
        self.num_heads, self.causal, self.rotary = num_heads, causal, rotary
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, key_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """x `[B, N, dim]`; `key_mask` bool `[B, N]`, True where a token exists: those come first."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rotary:
            q, k = _rotated(q, k, cache)
        if cache is None:
            out = self.attend(q, k, v, key_mask)
        else:
            out = cache.extend(q, k, v, key_mask, self.attend)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.causal or key_mask is None:  # padding is on the right, where a causal query does not look
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        v = torch.where(key_mask[:, None, :, None], v, 0)
        first = torch.arange(k.shape[2], device=k.device) == 0  # a softmax over nothing would be NaN
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(key_mask | first)[:, None, None])

    def new_cache(self) -> Cache:
        return KeyValueCache()


class LocalAttention(FullAttention):
    """The near field of FMA alone: a token attends to its cell and the cells beside it (causal: the one before it)."""

    def __init__(self, dim: int, num_heads: int, cell_size: int, *, causal: bool, rotary: bool, proj_drop: float):
        super().__init__(dim, num_heads, causal=causal, rotary=rotary, proj_drop=proj_drop)
        self.cell_size = cell_size

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        (batch, _, tokens, _), cell = q.shape, self.cell_size
        cells, window = -(-tokens // cell), (2 if self.causal else 3) * cell

        def cut(x: Tensor, before: int, after: int, size: int) -> Tensor:
            """`[B, heads, N, head_dim]` in pieces of `size`, one a cell: `[B * cells, heads, size, head_dim]`."""
            x = F.pad(x, (0, 0, before, cells * cell - tokens + after)).unfold(2, size, cell)
            return x.permute(0, 2, 1, 4, 3).flatten(0, 1)

        sides = (cell, 0 if self.causal else cell)
        query, key = torch.arange(cell, device=q.device), torch.arange(window, device=q.device) - cell
        place = torch.arange(cells, device=q.device)[:, None] * cell + key
        exists = ((place >= 0) & (place < tokens))[None, :, None]
        if self.causal:
            exists = exists & (key <= query[:, None])
        elif key_mask is not None:
            seen = F.pad(key_mask, (cell, cells * cell - tokens + cell)).unfold(1, window, cell)[:, :, None]
            # Queries in cells with no token near attend to absent tokens, whose values are zero: no NaN.
            exists = seen | ~seen.any(-1, keepdim=True)
            v = torch.where(key_mask[:, None, :, None], v, 0)
        exists = exists.expand(batch, -1, cell, -1).flatten(0, 1)[:, None]
        out = F.scaled_dot_product_attention(
            cut(q, 0, 0, cell), cut(k, *sides, window), cut(v, *sides, window), attn_mask=exists
        )
        return out.unflatten(0, (batch, cells)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]

    def new_cache(self) -> MultipoleCache:
        return MultipoleCache(self.cell_size)
