"""Other attention layers for the same skeleton, `[B, H, W, dim]` to the same: for comparisons and warm starts.

`fma2d.backbone.FMA2DBackbone` calls its `attn_layer` with `(dim, num_heads, stage, block)` for each block. That is a
function which makes a layer, `mit_attention` or one of yours; the classes here are no such functions:

    timm.create_model("fma2d_nano", attn_layer=mit_attention)
    timm.create_model("fma2d_nano", attn_layer=lambda dim, num_heads, stage, block: DenseAttention(dim, num_heads))
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of keys and values in MiT's stages, a side.
MIT_REDUCTION = (8, 4, 2, 1)


class DenseAttention(nn.Module):
    """Every token attends to every token; the parameters of `FMA2d` without kernels."""

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = True, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=self.mask(height, width, x.device))
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(batch, height, width, dim)))

    def mask(self, height: int, width: int, device: torch.device) -> Tensor | None:
        """`[H * W, H * W]`, True where a token (row) attends to another; None: everywhere."""
        return None


class SpatialReductionAttention(nn.Module):
    """Keys and values of a grid reduced by a strided convolution (MiT, arXiv:2105.15203)."""

    def __init__(self, dim: int, num_heads: int, *, sr_ratio: int = 1, qkv_bias: bool = True, proj_drop: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(dim) if sr_ratio > 1 else None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        reduced = x
        if self.sr is not None:
            reduced = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = self.kv(reduced).flatten(1, 2).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3])))


def mit_attention(dim: int, num_heads: int, stage: int, block: int) -> SpatialReductionAttention:
    """`attn_layer` of MiT: `SpatialReductionAttention` with the ratio of the stage."""
    return SpatialReductionAttention(dim, num_heads, sr_ratio=MIT_REDUCTION[stage])
