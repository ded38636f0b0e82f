"""Attention layers that FMA is compared with on its own skeleton, beside those of `fma2d.baselines`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fma2d.baselines import DenseAttention


class NearFieldAttention(DenseAttention):
    """`FMA2d`'s near field without its far field: tokens of a token's own cell and of the neighbouring cells.

    A full attention matrix under a mask, to measure what a far field is worth; nothing is saved.
    """

    def __init__(self, dim: int, num_heads: int, *, cell_size: int, qkv_bias: bool = True, proj_drop: float = 0.0):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop)
        self.cell_size = cell_size

    def mask(self, height: int, width: int, device: torch.device) -> Tensor:
        rows, cols = (torch.arange(n, device=device) // self.cell_size for n in (height, width))
        near_rows, near_cols = ((cells[:, None] - cells).abs() <= 1 for cells in (rows, cols))
        return (near_rows[:, None, :, None] & near_cols[None, :, None, :]).flatten(2).flatten(0, 1)


class WindowAttention(DenseAttention):
    """Tokens attend within windows of `window x window` tokens, shifted by `shift` (Swin, arXiv:2103.14030).

    Without a relative position bias, since Mix-FFN gives position. Windows are laid over the padded grid; absent
    tokens, and tokens that only the cyclic shift brings together, do not attend to each other.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        shift: int = 0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
    ):
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, proj_drop=proj_drop)
        self.window, self.shift = window, shift

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        window = self.window
        padding = (0, -width % window, 0, -height % window)
        qkv = F.pad(self.qkv(x), (0, 0, *padding)).roll((-self.shift, -self.shift), (1, 2))
        region = self._regions(height, width, padding, x.device)
        tokens = self._partition(qkv).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
        region = self._partition(region[None, ..., None])[..., 0]
        mask = (region[..., :, None] == region[..., None, :])[:, :, None]
        out = F.scaled_dot_product_attention(*tokens.unbind(0), attn_mask=mask)
        rows, cols = qkv.shape[1] // window, qkv.shape[2] // window
        out = out.transpose(2, 3).flatten(-2).unflatten(2, (window, window)).unflatten(1, (rows, cols))
        out = out.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)
        out = out.roll((self.shift, self.shift), (1, 2))[:, :height, :width]
        return self.proj_drop(self.proj(out))

    def _partition(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to `[B, windows, window * window, C]`."""
        x = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)

    def _regions(self, height: int, width: int, padding: tuple[int, ...], device: torch.device) -> Tensor:
        """A number for each place after padding and shift; places attend to those of their window and number."""

        def axis(extent: int, pad: int) -> Tensor:
            place = (torch.arange(extent + pad, device=device) + self.shift) % (extent + pad)
            return (place < self.shift) + 2 * (place >= extent)

        return axis(height, padding[3])[:, None] * 4 + axis(width, padding[1])
