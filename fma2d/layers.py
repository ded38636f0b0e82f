"""The parts of the backbone around attention: patch embedding, Mix-FFN, block (SegFormer, arXiv:2105.15203)."""

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

# Without gradients, Mix-FFN's hidden features exist for about this many elements at a time; with gradients, of more
# than that only one map is kept for the backward pass, not three.
BAND = 1 << 22


@register_notrace_module
class PatchEmbed(nn.Module):
    """Overlapping patches: `[B, C, H, W]` to `[B, ceil(H / stride), ceil(W / stride), dim]`, normalised."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int, eps: float, device=None, dtype=None):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride, patch_size // 2, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Proxy) and x.dim() != 4:  # a proxy has no shape to look at
            raise ValueError(f"x must be images [B, channels, H, W], got {tuple(x.shape)}")
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


@register_notrace_module
class MixFFN(nn.Module):
    """Linear, 3x3 depthwise convolution, GELU, linear, on `[B, H, W, dim]`; the convolution gives position.

    Hidden features would set the peak of memory. Without gradients it runs in bands of rows, each with a row of its
    neighbours on either side, so that those of the whole image never exist at once; with gradients, convolution and
    GELU of a large image are computed again in the backward pass.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, device=device, dtype=dtype)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(x, Proxy):
            return self._hidden(x, 0, height)
        if torch.is_grad_enabled():
            x = self.fc1(x)
            if x.numel() <= BAND or torch._C._are_functorch_transforms_active():  # which know no recomputation
                return self._rest(x, 0, height)
            return checkpoint(self._rest, x, 0, height, use_reentrant=False, preserve_rng_state=self.drop.p > 0)
        band = max(1, BAND // max(1, batch * width * self.fc1.out_features))
        if band >= height:
            return self._hidden(x, 0, height)
        out = torch.empty_like(x) if x.dtype == self.fc2.weight.dtype else None
        bands = []
        for start in range(0, height, band):
            rows = slice(max(0, start - 1), min(height, start + band + 1))
            piece = self._hidden(x[:, rows], start - rows.start, min(height, start + band) - rows.start)
            if out is not None and piece.dtype == out.dtype:
                out[:, start : start + band] = piece
            else:
                bands.append(piece)
        return torch.cat(bands, 1) if bands else out

    def _hidden(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the result; those outside are only a neighbourhood."""
        return self._rest(self.fc1(x), start, stop)

    def _rest(self, x: Tensor, start: int, stop: int) -> Tensor:
        x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, start:stop]
        return self.drop(self.fc2(self.drop(self.act(x))))


class Block(nn.Module):
    """Pre-norm attention and pre-norm Mix-FFN with residuals, on `[B, H, W, dim]`.

    Args:
        dim: channels.
        attn: any module from `[B, H, W, dim]` to the same.
        mlp_ratio: hidden channels of the Mix-FFN over `dim`.
        drop: dropout rate of the Mix-FFN.
        drop_path: rate of stochastic depth.
        eps: of the LayerNorms.
        device, dtype: of the parameters made here.
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(dim, eps, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps, **dd)
        self.mlp = MixFFN(dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
