"""One skeleton, seven attention layers, equal parameters."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fma2d.backbone import FMA2DBackbone
from fma2d.baselines import DenseAttention, SpatialReductionAttention
from fma2d.geometry import num_levels
from fma2d.modules import FMA2d
from tools.ending import InputError

from ..attention_layers import NearFieldAttention, WindowAttention
from .tasks import Task

# The name in files and its meaning; those with a far field of coarse levels first.
VARIANTS = dict(
    linear="linear FMA",
    loglinear="log-linear FMA",
    mean="linear FMA, mean aggregation",
    near="near field only",
    window="windows, shifted (Swin's)",
    reduction="spatial reduction (MiT's)",
    full="full attention",
)
FAR_FIELD = dict(
    linear=dict(variant="linear"),
    loglinear=dict(variant="loglinear"),
    mean=dict(variant="linear", aggregation="mean"),
)
MLP_RATIO = 4.0  # of linear FMA, whose parameters the others are given
TOLERANCE = 0.03  # by which parameters may differ


class TokenClassifier(nn.Module):
    """`[B, in_chans, H, W]` to logits of the first stage's tokens, `[B, classes, H / 4, W / 4]`, from all stages."""

    def __init__(self, backbone: FMA2DBackbone, classes: int):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Conv2d(sum(info["num_chs"] for info in backbone.feature_info), classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.forward_intermediates(x, intermediates_only=True)
        size = features[0].shape[-2:]
        features = [F.interpolate(f, size=size, mode="bilinear") if f.shape[-2:] != size else f for f in features]
        return self.classifier(torch.cat(features, 1))

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


def levels(task: Task, cell_sizes: Sequence[int]) -> list[int]:
    """`L` of each stage.

    Raises:
        InputError: if it is 0 everywhere, for then FMA is full attention.
    """
    found = [num_levels(grid, r) for grid, r in zip(task.grids, cell_sizes, strict=True)]
    if not any(found):
        shown = ", ".join(f"{h} x {w} tokens in cells of {r}" for (h, w), r in zip(task.grids, cell_sizes, strict=True))
        raise InputError(
            f"{task.name}: no stage has a coarse level ({shown}), so there is no far field to compare; "
            "cells must be smaller than half the grid"
        )
    return found


def build(task: Task, variant: str, cell_sizes: Sequence[int], rank: int, mlp_ratio: float = MLP_RATIO) -> nn.Module:
    """The task's model with one of `VARIANTS`: `[B, C, H, W]` to logits `[B, classes]` or `[B, classes, h, w]`.

    Windows are as wide as the near field, three cells.
    """

    def attention(dim: int, heads: int, stage: int, block: int) -> nn.Module:
        cell = cell_sizes[stage]
        if variant in FAR_FIELD:
            return FMA2d(dim, heads, cell, rank, levels=stage_levels[stage], **FAR_FIELD[variant])
        if variant == "near":
            return NearFieldAttention(dim, heads, cell_size=cell)
        if variant == "window":
            return WindowAttention(dim, heads, window=3 * cell, shift=3 * cell // 2 if block % 2 else 0)
        if variant == "reduction":
            return SpatialReductionAttention(dim, heads, sr_ratio=task.reductions[stage])
        return DenseAttention(dim, heads)

    stage_levels = levels(task, cell_sizes)
    shape = dict(in_chans=task.in_chans, dims=task.dims, depths=task.depths, head_dim=task.head_dim)
    shape |= dict(mlp_ratio=mlp_ratio, attn_layer=attention)
    if task.labels_tokens:
        model = TokenClassifier(FMA2DBackbone(num_classes=0, global_pool="", **shape), task.classes)
    else:
        model = FMA2DBackbone(num_classes=task.classes, **shape)
    for module in model.modules():  # the backbone's 0.02 is for hundreds of channels; here its blocks would start mute
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


def count(model: nn.Module) -> int:
    """Parameters, aggregation kernels included."""
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def parameters(task: Task, variant: str, cell_sizes: tuple[int, ...], rank: int) -> int:
    """Of a model at `MLP_RATIO`."""
    with torch.random.fork_rng(devices=[]):
        return count(build(task, variant, cell_sizes, rank))


def matched_ratio(task: Task, variant: str, cell_sizes: Sequence[int], rank: int) -> float:
    """The ratio of the Mix-FFN that gives a variant the parameters of linear FMA, a multiple of 1 / 16.

    Raises:
        InputError: if no ratio of at least 1 brings them within `TOLERANCE`.
    """
    target, own = (parameters(task, name, tuple(cell_sizes), rank) for name in ("linear", variant))
    # A hidden channel: a row and a column of the linear layers, nine weights of the convolution, two biases.
    slope = sum(depth * dim * (2 * dim + 11) for dim, depth in zip(task.dims, task.depths, strict=True))
    ratio = max(1.0, round(16 * (MLP_RATIO + (target - own) / slope)) / 16)
    off = (own + (ratio - MLP_RATIO) * slope) / target - 1
    if abs(off) > TOLERANCE:
        raise InputError(f"{task.name}, {variant}: parameters cannot be matched, {off:+.1%} at an MLP ratio of {ratio}")
    return ratio
