"""Multipole attention for pretrained vision transformers: their weights stay, dense attention over the patches goes.

The patches of a ViT form a grid, its prefix tokens (class, distillation, registers) do not. A patch attends to the
other patches by Fast Multipole Attention and to every prefix token exactly, in one softmax: all patches together enter
it as one entry, with their log-sum-exp as its score. A prefix token attends to every token exactly.

Blocks see a flat sequence. Height and width of the grid travel from the image to the attention with the call, as timm's
`attn_mask`, in the shape of a tensor without elements, `[H, W, 0]`: a module that runs in threads, on several sizes
before one backward pass, or again when a checkpoint is recomputed has no other place for them that is its call's own.
"""

from functools import cache, partial
from inspect import signature

import torch
from timm.models import register_notrace_module
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .checkpoint import report_loads
from .geometry import num_levels
from .modules import FMA2d
from .ops import dense, multipole_attention
from .ops.call import Call, Options

MASKS_REFUSED = "attn_mask and is_causal are refused: multipole attention over patches has no masks"


class GridModel:
    """What a converted model does besides its own class: it tells its blocks the patch grid of each image."""

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward_features(x, attn_mask=self._grid(x, attn_mask, is_causal))

    def forward_intermediates(
        self, x: Tensor, *args, attn_mask: Tensor | None = None, is_causal: bool = False, **options
    ):
        return super().forward_intermediates(x, *args, attn_mask=self._grid(x, attn_mask, is_causal), **options)

    def _grid(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """`[H, W, 0]` of images `[B, C, height, width]`."""
        if attn_mask is not None or is_causal:
            raise ValueError(MASKS_REFUSED)
        return x.new_empty((*self.patch_embed.dynamic_feat_size(x.shape[-2:]), 0))

    # With an `attn_mask` timm's loops over blocks do not checkpoint: the blocks do it themselves.
    @property
    def grad_checkpointing(self) -> bool:
        return any(block.grad_checkpointing for block in self.blocks)

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        for block in self.blocks:
            block.grad_checkpointing = enable


class GridBlock:
    """What a block of a converted model does besides its own class: it keeps its input alone for the backward pass."""

    grad_checkpointing = False

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(super().forward, x, attn_mask, is_causal, use_reentrant=False)
        return super().forward(x, attn_mask, is_causal)


@cache
def converted_class(mixin: type, own: type) -> type:
    """A model's or a block's own class with `mixin` before it; pickled by the two, as no module holds it."""

    def reduce(self, protocol: int) -> tuple:
        state = own.__reduce_ex__(self, protocol)[2]
        return _empty, (mixin, own), state

    members = dict(__reduce_ex__=reduce, __module__=own.__module__, __doc__=own.__doc__)
    return type(own.__name__, (mixin, own), members)


def _empty(mixin: type, own: type) -> nn.Module:
    made = converted_class(mixin, own)
    return made.__new__(made)


@register_notrace_module
class ViTAttention(FMA2d):
    """The attention of a ViT's block, `[B, prefix + H * W, dim]` to the same, with that block's own layers.

    Args:
        attn: the attention whose layers and names of parameters are taken over.
        prefix: number of tokens before the patches.
        The others as in `FMA2d`; no level learned means fixed averaging.
    """

    def __init__(
        self,
        attn: Attention,
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
        self.prefix = prefix
        self.qkv, self.proj, self.proj_drop = attn.qkv, attn.proj, attn.proj_drop
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        # Versions of timm differ in what may lie between attention and projection.
        self.norm, self.gate = getattr(attn, "norm", nn.Identity()), getattr(attn, "gate", None)
        self.train(attn.training)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """`attn_mask`: the patch grid, `[H, W, 0]`."""
        grid = self._grid(x.shape[1], attn_mask, is_causal)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).transpose(1, 3).unbind(2)
        out = self.norm(self.attend(self.q_norm(q), self.k_norm(k), v, grid).flatten(-2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """`[B, heads, prefix + H * W, head_dim]`, three times, to `[B, prefix + H * W, heads, head_dim]`."""
        prefix, scale = self.prefix, self.head_dim**-0.5
        if num_levels(grid, self.cell_size) == 0:  # dense attention, of all tokens at once
            stacks = [] if self.kernels is None else [self.kernels]
            options = Options(self.cell_size, self.rank, self.variant, False, True, scale)
            return dense.attention(Call(q, k, v, stacks, None, options)).transpose(1, 2)
        patches = [t[:, :, prefix:].unflatten(2, grid) for t in (q, k, v)]
        if not prefix:
            return multipole_attention(*patches, **self.call_options()).flatten(2, 3).transpose(1, 2)
        out, lse = multipole_attention(*patches, return_lse=True, **self.call_options())
        out, lse = out.flatten(2, 3), lse.flatten(2)[..., None]
        with torch.autocast(q.device.type, enabled=False):  # float16 overflows, bfloat16 rounds scores to eighths
            scores = q[:, :, prefix:].to(lse.dtype) @ (k[:, :, :prefix].to(lse.dtype) * scale).mT
        total = torch.logaddexp(lse, scores.logsumexp(-1, keepdim=True))
        shares = (scores - total).exp().to(out.dtype) @ v[:, :, :prefix].to(out.dtype)
        out = torch.addcmul(shares, out, (lse - total).exp().to(out.dtype))
        first = scaled_dot_product_attention(q[:, :, :prefix], k, v, scale=scale)
        return torch.cat((first.transpose(1, 2).to(out.dtype), out.transpose(1, 2)), 1)

    def _grid(self, tokens: int, attn_mask: Tensor | None, is_causal: bool) -> tuple[int, int]:
        """Height and width of the patch grid, if they fit."""
        if attn_mask is None and not is_causal:
            raise RuntimeError("the patch grid is not known: run the model as a whole, from its patch embedding on")
        if is_causal or attn_mask.dim() != 3 or attn_mask.shape[2] != 0:
            raise ValueError(MASKS_REFUSED)
        height, width = attn_mask.shape[:2]
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
    own = type(model)
    for part in (own.forward_features, own.forward_intermediates, *(type(block).forward for block in model.blocks)):
        if "attn_mask" not in signature(part).parameters:
            raise ValueError(
                f"{part.__qualname__} takes no attn_mask, which brings the patch grid to blocks: a newer timm has it"
            )
    settings = (model.num_prefix_tokens, cell_size, rank, levels, variant, backend)
    layers = [ViTAttention(block.attn, *settings) for block in model.blocks]
    checkpointing = model.grad_checkpointing
    for block, layer in zip(model.blocks, layers, strict=True):
        block.attn = layer
        block.__class__ = converted_class(GridBlock, type(block))
    model.__class__ = converted_class(GridModel, own)
    model.grad_checkpointing = checkpointing
    report_loads(model)
    if levels:
        kernels = {f"blocks.{i}.attn.kernels" for i in range(len(layers))}
        model.no_weight_decay = partial(set, model.no_weight_decay() | kernels)
    return model
