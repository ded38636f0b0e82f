"""Multipole attention for pretrained vision transformers: their weights stay, dense attention over the patches goes.

The patches of a ViT form a grid, its prefix tokens (class, distillation, registers) do not. A patch attends to the
other patches by Fast Multipole Attention and to every prefix token exactly, in one softmax: all patches together enter
it as one entry, with their log-sum-exp as its score. A prefix token attends to every token exactly.
"""

from functools import partial

import torch
from timm.models import register_notrace_module
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoint import report_loads
from .modules import FMA2d
from .ops import multipole_attention


class PatchGrid:
    """Height and width in patches of the image that is on its way through a ViT; the blocks see a flat sequence."""

    size: tuple[int, int] | None = None

    def record(self, patch_embed: nn.Module, args: tuple[Tensor]) -> None:
        """Forward pre-hook of the patch embedding."""
        self.size = patch_embed.dynamic_feat_size(args[0].shape[-2:])


@register_notrace_module
class ViTAttention(FMA2d):
    """The attention of a ViT's block, `[B, prefix + H * W, dim]` to the same, with that block's own layers.

    Args:
        attn: the attention whose layers and names of parameters are taken over.
        grid: where H and W are found in a forward pass.
        prefix: number of tokens before the patches.
        The others as in `FMA2d`; no level learned means fixed averaging.
    """

    def __init__(
        self,
        attn: Attention,
        grid: PatchGrid,
        prefix: int,
        cell_size: int,
        rank: int,
        levels: int,
        variant: str,
        backend: str,
    ):
        with torch.device("meta"):  # its projections give way to those of `attn`
            super().__init__(
                attn.num_heads * attn.head_dim,
                attn.num_heads,
                cell_size,
                rank,
                levels=levels,
                variant=variant,
                aggregation="learned" if levels else "mean",
                backend=backend,
            )
        self._make_kernels(attn.qkv.weight.device)
        self.grid, self.prefix = grid, prefix
        self.qkv, self.proj, self.proj_drop = attn.qkv, attn.proj, attn.proj_drop
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        # Versions of timm differ in what may lie between attention and projection.
        self.norm, self.gate = getattr(attn, "norm", nn.Identity()), getattr(attn, "gate", None)
        self.train(attn.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask and is_causal are refused: multipole attention over patches has no masks")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        out = self.attend(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).flatten(-2)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[B, heads, prefix + H * W, head_dim]`, three times, to the same."""
        height, width = self._grid(q.shape[2])
        prefix = self.prefix
        patches = [t[:, :, prefix:].unflatten(2, (height, width)) for t in (q, k, v)]
        out, lse = multipole_attention(*patches, return_lse=True, **self.call_options())
        out, lse = out.flatten(2, 3), lse.flatten(2)
        if not prefix:
            return out
        scores = (q[:, :, prefix:] @ k[:, :, :prefix].mT) * self.head_dim**-0.5
        weights = torch.cat((lse[..., None], scores.to(lse.dtype)), -1).softmax(-1).to(out.dtype)
        out = weights[..., :1] * out + weights[..., 1:] @ v[:, :, :prefix]
        first = F.scaled_dot_product_attention(q[:, :, :prefix], k, v)
        return torch.cat((first, out.to(first.dtype)), 2)

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Height and width of the patch grid, if they fit."""
        if self.grid.size is None:
            raise RuntimeError("the patch grid is not known: run the model as a whole, from its patch embedding on")
        height, width = self.grid.size
        if tokens != self.prefix + height * width:
            raise RuntimeError(
                f"a block got {tokens} tokens where the image has {height} x {width} patches and {self.prefix} prefix "
                "tokens: multipole attention needs the whole grid, so nothing may drop, merge or add tokens"
            )
        return height, width


def convert_attention(
    model: VisionTransformer,
    cell_size: int = 8,
    rank: int = 4,
    variant: str = "loglinear",
    *,
    levels: int = 0,
    backend: str = "auto",
) -> VisionTransformer:
    """Swap the attention of every block of a timm ViT for multipole attention over its patches, in place.

    For ViT, DeiT, DINOv2 and their like, with any number of prefix tokens, LayerScale, query and key norms. All weights
    stay, the same tensors under the same names, so checkpoints of the original load as before; learned kernels add
    `blocks.*.attn.kernels`, which such a file need not hold. Any image that the model itself takes may be fed. Where
    the patch grid is at most `2 * cell_size` a side there are no coarse levels, and the model computes what it did.

    Args:
        model: a timm `VisionTransformer`; of a `features_only` model its `.model`.
        cell_size: patches per side of a base cell.
        rank: summary tokens per coarse cell.
        variant: "loglinear", which keeps every patch's own query and so is nearer to what was trained, or "linear".
        levels: coarse levels with learned kernels, for fine-tuning. They start as fixed averaging, which is what all
            others stay at. `fma2d.num_levels(patch grid, cell_size)` is the number of levels of an image.
        backend: see `fma2d.multipole_attention`.

    Returns:
        The model.

    Raises:
        TypeError: if it is not a VisionTransformer of timm.
        ValueError: if its blocks, attention or options cannot be replaced; the model is then unchanged.
    """
    if not isinstance(model, VisionTransformer):
        hint = "; convert its .model" if isinstance(getattr(model, "model", None), VisionTransformer) else ""
        raise TypeError(f"model must be a VisionTransformer of timm, got {type(model).__name__}{hint}")
    if not isinstance(model.patch_drop, nn.Identity):
        raise ValueError("patch_drop_rate drops patches, and multipole attention needs the whole grid: create without")
    for i, block in enumerate(model.blocks):
        found = getattr(block, "attn", block)
        if type(found) is not Attention:
            raise ValueError(f"blocks.{i} has {type(found).__name__} where timm's Attention is expected")
        if found.attn_drop.p:
            raise ValueError(
                "attn_drop_rate drops entries of the attention matrix, of which there is none: create without"
            )
    grid = PatchGrid()
    settings = (grid, model.num_prefix_tokens, cell_size, rank, levels, variant, backend)
    layers = [ViTAttention(block.attn, *settings) for block in model.blocks]
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attn = layer
    model.patch_embed.register_forward_pre_hook(grid.record)
    report_loads(model)
    if levels:
        kernels = {f"blocks.{i}.attn.kernels" for i in range(len(layers))}
        model.no_weight_decay = partial(set, model.no_weight_decay() | kernels)
    return model
