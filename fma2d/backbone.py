"""The hierarchical backbone; `models` registers it in timm.

Four stages at strides 4, 8, 16 and 32 on SegFormer's skeleton (arXiv:2105.15203) with Fast Multipole Attention
(arXiv:2310.11960v4) in place of its attention. There is no position embedding, so any input size runs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import sqrt

import torch
from timm.layers import ClassifierHead, is_exportable, to_2tuple, to_ntuple, trunc_normal_
from timm.models import checkpoint_seq, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .checkpoint import report_loads
from .checks import check_choice, check_dtype, check_integer, check_integers, check_number, check_positive, check_rate
from .geometry import num_levels
from .layers import Block, PatchEmbed
from .modules import FMA2d

register_notrace_module(FMA2d)

# Settings of FMA2d and their defaults here; one value, or one per stage.
ATTENTION = dict(
    cell_size=8, rank=4, variant="linear", aggregation="learned", share_heads=False, qkv_bias=True, backend="auto"
)


class Stage(nn.Module):
    """Patch embedding, blocks, norm: `[B, C, H, W]` to `[B, dim, ceil(H / stride), ceil(W / stride)]`."""

    def __init__(
        self,
        in_chans: int,
        dim: int,
        patch_size: int,
        stride: int,
        blocks: Sequence[Block],
        eps: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, dim, patch_size, stride, eps, device, dtype)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x).permute(0, 3, 1, 2)


class FMA2DBackbone(nn.Module):
    """Hierarchical vision backbone with Fast Multipole Attention.

    `[B, in_chans, H, W]` to logits, for any H and W. Settings marked (*) are one value, or one per stage; those marked
    (+) are of `FMA2d` and cannot be given together with `attn_layer`.

    Args:
        in_chans: input channels.
        num_classes: classes of the head; 0 for none.
        global_pool: pooling before the head ("avg", "max", "avgmax", "catavgmax"; "": none, logits of every position).
        dims: channels of each stage.
        depths: blocks of each stage.
        head_dim: (*) channels per head.
        cell_size: (*+) tokens per side of a base cell; default 8.
        rank: (*+) summary tokens per coarse cell; default 4.
        variant: (*+) "linear" (default) or "loglinear".
        aggregation: (*+) "learned" (default) or "mean".
        share_heads: (*+) one set of kernels for all heads; default False.
        img_size: pixels (int or (H, W)) for whose grids kernels are learned; any size may be fed. In a model made under
            timm's `exportable=True` the largest size that may be fed.
        levels: (*+) the number of levels with learned kernels instead, as a number.
        backend: (*+) of the operator, see `fma2d.multipole_attention`; default "auto".
        mlp_ratio: (*) hidden channels of the Mix-FFN over those of the stage.
        qkv_bias: (*+) bias of the query, key and value projection; default True.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after projections.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        attn_layer: another attention than `FMA2d`: a function of `(dim, num_heads, stage, block)` that makes a
            layer, such as `fma2d.baselines.mit_attention`.
        eps: of the LayerNorms.
        device, dtype: of the parameters.

    Raises:
        TypeError, ValueError: for options that do not fit; the message names them.
    """

    loads_strictly = False  # as part of another model

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (3, 4, 6, 3),
        head_dim: int | Sequence[int] = 64,
        cell_size: int | Sequence[int] | None = None,
        rank: int | Sequence[int] | None = None,
        variant: str | Sequence[str] | None = None,
        aggregation: str | Sequence[str] | None = None,
        share_heads: bool | Sequence[bool] | None = None,
        img_size: int | tuple[int, int] = 224,
        levels: int | Sequence[int] | None = None,
        backend: str | Sequence[str] | None = None,
        mlp_ratio: float | Sequence[float] = 4.0,
        qkv_bias: bool | Sequence[bool] | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_layer: Callable[[int, int, int, int], nn.Module] | None = None,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, sizes in (("dims", dims), ("depths", depths)):
            check_integers(name, sizes)
            for size in sizes:
                check_positive(name, size)
        if not dims or len(dims) != len(depths):
            raise ValueError(f"dims and depths must have a value per stage each, got {dims} and {depths}")
        check_positive("in_chans", in_chans)
        _check_head(num_classes, global_pool)
        rates = dict(drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        for name, rate in rates.items():
            check_rate(name, rate)
        check_number("eps", eps, 0)
        check_dtype(dtype)
        if attn_layer is not None and not callable(attn_layer):
            raise TypeError(f"attn_layer must be a function that makes a layer, got {attn_layer!r}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)]
        given = dict(
            cell_size=cell_size,
            rank=rank,
            variant=variant,
            aggregation=aggregation,
            share_heads=share_heads,
            qkv_bias=qkv_bias,
            backend=backend,
            levels=levels,
        )
        given = {name: value for name, value in given.items() if value is not None}
        if given and attn_layer is not None:
            raise ValueError(f"{', '.join(given)} cannot be given with attn_layer: they are settings of FMA2d")
        settings = {name: self._per_stage(name, value) for name, value in (ATTENTION | given).items()}
        grid_levels = tuple(self._grid_levels(img_size, i, r) for i, r in enumerate(settings["cell_size"]))
        settings.setdefault("levels", grid_levels)
        if is_exportable():
            settings["export_levels"] = grid_levels
        self.img_size, self.export_size = img_size if levels is None else None, img_size
        head_dims, mlp_ratios = self._per_stage("head_dim", head_dim), self._per_stage("mlp_ratio", mlp_ratio)
        for size in head_dims:
            check_positive("head_dim", size)
        for dim, ratio in zip(dims, mlp_ratios, strict=True):
            check_number("mlp_ratio", ratio, 0)
            check_integer(f"mlp_ratio * {dim}, the hidden channels,", int(ratio * dim), 1)
        drop_paths = [drop_path_rate * i / max(1, sum(depths) - 1) for i in range(sum(depths))]

        dd = dict(device=device, dtype=dtype)
        stages = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if dim % head_dims[i]:
                raise ValueError(f"head_dim must divide the channels of stage {i}, {dim}, got {head_dims[i]}")
            heads = dim // head_dims[i]
            blocks = []
            for j in range(depth):
                if attn_layer is not None:
                    attn = attn_layer(dim, heads, i, j).to(**dd)
                else:
                    own = {name: values[i] for name, values in settings.items()}
                    attn = FMA2d(dim, heads, proj_drop=proj_drop_rate, **own, **dd)
                drop_path = drop_paths[sum(depths[:i]) + j]
                blocks.append(Block(dim, attn, mlp_ratios[i], proj_drop_rate, drop_path, eps, **dd))
            stages.append(Stage(dims[i - 1] if i else in_chans, dim, 3 if i else 7, 2 if i else 4, blocks, eps, **dd))
        self.stages = nn.Sequential(*stages)
        self.num_features = dims[-1]
        # timm before 1.0.21 has no device and dtype here.
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate).to(**dd)
        self.apply(partial(_init_weights, needs_reset=False))
        report_loads(self)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Give the weights new start values: those drawn at random and, if `needs_reset`, kernels and norms."""
        self.apply(partial(_init_weights, needs_reset=needs_reset))

    def _per_stage(self, name: str, value) -> tuple:
        stages = len(self.feature_info)
        value = to_ntuple(stages)(value)
        if len(value) != stages:
            raise ValueError(f"{name} must be one value or one per stage ({stages}), got {value}")
        return tuple(value)

    def _grid_levels(self, img_size: int | Sequence[int], stage: int, cell_size: int) -> int:
        """Levels of the grid of a stage at a size in pixels."""
        size = to_2tuple(img_size)
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in size):
            raise TypeError(f"img_size must be an integer or (height, width), got {img_size!r}")
        if len(size) != 2 or min(size) < 1:
            raise ValueError(f"img_size must be an integer or (height, width) of at least 1, got {img_size}")
        return num_levels(tuple(-(-n // self.feature_info[stage]["reduction"]) for n in size), cell_size)

    @property
    def head_hidden_size(self) -> int:
        """Channels that the classifier reads."""
        return self.num_features * self.head.global_pool.feat_mult()

    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        cell_size: int | Sequence[int] | None = None,
        rank: int | Sequence[int] | None = None,
    ) -> None:
        """Learn kernels for another input size, cell size or rank; what was learned is carried over.

        The kernels become other parameters: make the optimizer afterwards.

        Args:
            img_size: pixels for whose grids kernels are learned, instead of the levels so far; None: those stay.
            cell_size, rank: one value, or one per stage; None: as they are.

        Raises:
            TypeError, ValueError: for what a new model would refuse; nothing is changed then.
        """
        layers = [(i, m) for i, stage in enumerate(self.stages) for m in stage.modules() if isinstance(m, FMA2d)]
        given = dict(cell_size=cell_size, rank=rank)
        given = {name: self._per_stage(name, value) for name, value in given.items() if value is not None}
        if given and not layers:
            raise ValueError(f"{', '.join(given)} cannot be set: the attention layers are not FMA2d")
        size = self.img_size if img_size is None else img_size
        export_size = self.export_size if img_size is None else img_size
        plan = []
        for i, layer in layers:
            cells = {name: given[name][i] if name in given else getattr(layer, name) for name in ("cell_size", "rank")}
            check_positive("cell_size", cells["cell_size"])
            levels = layer.levels if size is None else self._grid_levels(size, i, cells["cell_size"])
            layer.check_cells(**cells, levels=levels)
            plan.append((layer, dict(cells, levels=levels), self._grid_levels(export_size, i, cells["cell_size"])))
        for layer, cells, export_levels in plan:
            layer.change_cells(**cells)
            if layer.export_levels is not None:
                layer.export_levels = export_levels
        self.img_size, self.export_size = size, export_size
        _record_arguments(self, size, **given)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".kernels")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        stage = r"^stages\.(\d+)"
        parts = [(stage + r"\.patch_embed", (0,)), (stage + r"\.blocks\.(\d+)", None), (stage + r"\.norm", (99999,))]
        return dict(stem=r"^stages\.0\.patch_embed", blocks=stage if coarse else parts)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        _check_head(num_classes, self.head.global_pool.pool_type if global_pool is None else global_pool)
        like = self.stages[0].norm.weight
        self.num_classes = num_classes
        self.head.reset(num_classes, pool_type=global_pool)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        """Load weights, of another input size, cell size, rank or variant too, and report what was done in one line.

        Raises:
            RuntimeError: for keys that are missing (unless `strict` is False) or have another shape; nothing is
                loaded then.
        """
        # torch tells neither the hooks nor the modules whether a load is strict, and raises when all else is loaded.
        was_strict, self.loads_strictly = self.loads_strictly, strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self.loads_strictly = was_strict

    def _take(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        """The stages that these indices ask for, and the last of them; see `forward_intermediates`."""
        stages = len(self.stages)
        if isinstance(indices, int):
            check_integer("indices", indices, 1, stages)
        elif indices is not None:
            check_integers("indices", indices)
            for i in indices:
                check_integer("indices", i, -stages, stages - 1)
        return feature_take_indices(stages, indices)

    def prune_intermediate_layers(
        self, indices: int | list[int] | None = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that these features do not need; the features keep their norms, `prune_norm` or not.

        Args:
            indices: as in `forward_intermediates`.
            prune_head: drop pooling and classifier; they go with the last stage in any case.

        Returns:
            The indices of the stages asked for.
        """
        take, last = self._take(indices)
        ends_early = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if ends_early:
            self.num_features = self.head.in_features = self.feature_info[last]["num_chs"]
        if prune_head or ends_early:
            self.reset_classifier(0, "")
        return take

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
        take, last = self._take(indices)
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
        """Logits `[B, num_classes]`; without pooling those of every position, `[B, num_classes, h, w]`."""
        if self.head.global_pool.is_identity():
            x = self.head.drop(x)
            return x if pre_logits else self.head.fc(x.movedim(1, -1)).movedim(-1, 1)
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _check_head(num_classes: int, global_pool: str) -> None:
    check_integer("num_classes", num_classes, 0)
    kinds = ("avg", "max", "avgmax", "catavgmax")
    check_choice("global_pool", global_pool, ("", *kinds, "fast", *(f"fast{kind}" for kind in kinds)))


def _init_weights(module: nn.Module, needs_reset: bool) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()


def _record_arguments(model: nn.Module, img_size, **settings) -> None:
    """Have timm's `save_for_hf` write what was set after construction."""
    try:
        from timm.models._input import update_model_input_size
    except ImportError:  # older versions of timm keep no such record
        return
    update_model_input_size(model, img_size, **settings)
    if img_size is not None:
        model._model_args.pop("levels", None)
