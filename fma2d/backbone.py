"""The hierarchical backbone and its registered timm models.

Four stages at strides 4, 8, 16 and 32 on SegFormer's skeleton (arXiv:2105.15203) with Fast Multipole Attention
(arXiv:2310.11960v4) in place of its attention. There is no position embedding, so any input size runs.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import sqrt

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, to_2tuple, to_ntuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .geometry import num_levels
from .layers import Block, PatchEmbed
from .modules import FMA2d

register_notrace_module(FMA2d)
logger = logging.getLogger(__name__)


class Stage(nn.Module):
    """Patch embedding, blocks, norm: `[B, C, H, W]` to `[B, dim, ceil(H / stride), ceil(W / stride)]`."""

    def __init__(self, in_chans: int, dim: int, patch_size: int, stride: int, blocks: Sequence[Block], eps: float):
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, stride, eps)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x).permute(0, 3, 1, 2)


class FMA2DBackbone(nn.Module):
    """Hierarchical vision backbone with Fast Multipole Attention.

    `[B, in_chans, H, W]` to logits, for any H and W. Settings marked (*) are one value, or one per stage.

    Args:
        in_chans: input channels.
        num_classes: classes of the head; 0 for none.
        global_pool: pooling before the head ("avg", "max", "avgmax", "catavgmax", "" for none).
        dims: channels of each stage.
        depths: blocks of each stage.
        head_dim: (*) channels per head.
        cell_size: (*) tokens per side of a base cell.
        rank: (*) summary tokens per coarse cell.
        variant: (*) "linear" or "loglinear".
        aggregation: (*) "learned" or "mean".
        share_heads: (*) one set of kernels for all heads.
        img_size: pixels (int or (H, W)) for whose grids kernels are learned; any size may be fed.
        levels: (*) the number of levels with learned kernels instead, as a number.
        backend: of the operator, see `fma2d.multipole_attention`.
        mlp_ratio: (*) hidden channels of the Mix-FFN over those of the stage.
        qkv_bias: bias of the query, key and value projection.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        attn_layer: another attention than `FMA2d`: a function of `(dim, num_heads, stage, block)`, see `baselines`.
            The settings of `FMA2d` (cell_size to backend, qkv_bias) then play no part: the function has its own.
        eps: of the LayerNorms.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        head_dim: int | Sequence[int] = 64,
        cell_size: int | Sequence[int] = 8,
        rank: int | Sequence[int] = 4,
        variant: str | Sequence[str] = "linear",
        aggregation: str | Sequence[str] = "learned",
        share_heads: bool | Sequence[bool] = False,
        img_size: int | tuple[int, int] = 224,
        levels: int | Sequence[int] | None = None,
        backend: str = "auto",
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_layer: Callable[[int, int, int, int], nn.Module] | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        if len(dims) != len(depths):
            raise ValueError(f"dims and depths must have a value per stage each, got {dims} and {depths}")
        stages = len(dims)

        def per_stage(name: str, value) -> tuple:
            value = to_ntuple(stages)(value)
            if len(value) != stages:
                raise ValueError(f"{name} must be one value or one per stage ({stages}), got {value}")
            return tuple(value)

        self.num_classes, self.in_chans = num_classes, in_chans
        strides = tuple(4 * 2**i for i in range(stages))
        cell_sizes = per_stage("cell_size", cell_size)
        if levels is None:
            levels = tuple(
                num_levels(tuple(-(-n // stride) for n in to_2tuple(img_size)), r)
                for stride, r in zip(strides, cell_sizes, strict=True)
            )
        settings = dict(
            cell_size=cell_sizes,
            rank=per_stage("rank", rank),
            levels=per_stage("levels", levels),
            variant=per_stage("variant", variant),
            aggregation=per_stage("aggregation", aggregation),
            share_heads=per_stage("share_heads", share_heads),
        )
        head_dims, mlp_ratios = per_stage("head_dim", head_dim), per_stage("mlp_ratio", mlp_ratio)
        drop_paths = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]

        self.feature_info = []
        layers = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if dim % head_dims[i]:
                raise ValueError(f"head_dim must divide the channels of stage {i}, {dim}, got {head_dims[i]}")
            heads = dim // head_dims[i]
            blocks = []
            for j in range(depth):
                if attn_layer is not None:
                    attn = attn_layer(dim, heads, i, j)
                else:
                    own = {name: values[i] for name, values in settings.items()}
                    attn = FMA2d(dim, heads, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, backend=backend, **own)
                drop_path = drop_paths[sum(depths[:i]) + j]
                blocks.append(Block(dim, attn, mlp_ratios[i], proj_drop_rate, drop_path, eps))
            layers.append(Stage(dims[i - 1] if i else in_chans, dim, 3 if i else 7, 2 if i else 4, blocks, eps))
            self.feature_info.append(dict(num_chs=dim, reduction=strides[i], module=f"stages.{i}"))
        self.stages = nn.Sequential(*layers)
        self.num_features = self.head_hidden_size = dims[-1]
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(_init_weights)
        self.register_load_state_dict_post_hook(_report_kernels)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".kernels")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(
            stem=r"^stages\.0\.patch_embed",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.patch_embed", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features after the stages, each normalised (`norm` asks for what always is).

        Args:
            x: `[B, in_chans, H, W]`.
            indices: the last n stages if an int, all if None, else these stages.
            stop_early: leave out the stages after the last one asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the list alone, not `(final features, list)`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = stage(x)
            if i in take:
                intermediates.append(x if output_fmt == "NCHW" else x.permute(0, 2, 3, 1))
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        """`[B, in_chans, H, W]` to `[B, num_features, ceil(H / 32), ceil(W / 32)]`."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _report_kernels(model: nn.Module, incompatible) -> None:
    """Say in one line a kind what loading a state dict did to learned kernels beyond copying them."""
    for kind in ("adapted", "initialised", "dropped"):
        notes = {name: m.load_notes[kind] for name, m in model.named_modules() if kind in getattr(m, "load_notes", {})}
        if notes:
            first, note = next(iter(notes.items()))
            logger.warning("aggregation kernels %s in %d layers, e.g. %s: %s", kind, len(notes), first, note)


def _cfg(**kwargs) -> dict:
    return dict(
        url="",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=0.9,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="stages.0.patch_embed.proj",
        classifier="head.fc",
        license="apache-2.0",
        **kwargs,
    )


# No weights are published yet, so there are no urls.
default_cfgs = generate_default_cfgs({f"fma2d_{size}": _cfg() for size in ("nano", "tiny", "small", "base", "large")})


def _create(name: str, pretrained: bool, dims, depths, head_dim=64, variant="linear", **kwargs) -> FMA2DBackbone:
    # timm's builder has a `variant` of its own, the model's name; the attention's is bound here.
    model_cls = partial(FMA2DBackbone, dims=dims, depths=depths, head_dim=head_dim, variant=variant)
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), feature_cls="getter")
    return build_model_with_cfg(model_cls, name, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def fma2d_nano(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """MiT-B0's skeleton."""
    return _create(
        "fma2d_nano", pretrained, **dict(dict(dims=(32, 64, 160, 256), depths=(2, 2, 2, 2), head_dim=32), **kwargs)
    )


@register_model
def fma2d_tiny(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """MiT-B2's skeleton."""
    return _create("fma2d_tiny", pretrained, **dict(dict(dims=(64, 128, 320, 512), depths=(3, 4, 6, 3)), **kwargs))


@register_model
def fma2d_small(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """MiT-B3's skeleton."""
    return _create("fma2d_small", pretrained, **dict(dict(dims=(64, 128, 320, 512), depths=(3, 4, 18, 3)), **kwargs))


@register_model
def fma2d_base(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """The paper's FMA2D-B; its size matched to Swin-B's."""
    return _create("fma2d_base", pretrained, **dict(dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2)), **kwargs))


@register_model
def fma2d_large(pretrained: bool = False, **kwargs) -> FMA2DBackbone:
    """The paper's FMA2D-L; its size matched to Swin-L's."""
    return _create("fma2d_large", pretrained, **dict(dict(dims=(192, 384, 768, 1536), depths=(2, 2, 18, 2)), **kwargs))
