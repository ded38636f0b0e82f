"""The backbone `FMA2D` in mmengine's registry."""

import logging
from collections.abc import Mapping, Sequence

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..backbone import FMA2DBackbone
from ..checkpoint import check_state_dict, strip_compiled
from ..checks import check_bool, check_integer, check_integers, check_positive
from ..models import ARCHS
from .checkpoints import CheckpointError, fitting, one_line, read_weights


@MODELS.register_module()
class FMA2D(FMA2DBackbone, BaseModule):
    """The backbone of `fma2d.backbone`, without a classifier: `[B, in_channels, H, W]` to a tuple of feature maps.

    The maps are `[B, dims[i], ceil(H / stride), ceil(W / stride)]` with strides 4, 8, 16 and 32, for any H and W. Names
    in the state dict are those of the timm models, so checkpoints go from one to the other.

    Args:
        arch: a size of the timm models ("base" is `fma2d_base`), or a dict of `dims`, `depths` and `head_dim`.
        in_channels: input channels.
        out_indices: the stages whose features are returned, rising, negative ones counted from the end; later stages
            are left out.
        frozen_stages: the first so many stages are neither trained nor put into training mode; -1 or 0 for none.
        with_cp: recompute the blocks in the backward pass, to save memory.
        drop_path_rate: stochastic depth of the last block; grows linearly from 0.
        init_cfg: `dict(type="Pretrained", checkpoint=file)`, the file a `.pth` or `.safetensors` with the weights of a
            classifier (its head is left out, and said so), of a backbone, or of a whole segmentor or detector, whose
            `backbone.` part is taken (another one with `prefix=`). Other initialisers of mmengine work as ever; in a
            list they come before all that is pretrained.
        **settings: those of `fma2d.backbone.FMA2DBackbone`: `img_size`, `levels`, `cell_size`, `rank`, `variant`,
            `aggregation`, `share_heads`, `backend`, `mlp_ratio`, `qkv_bias`, `proj_drop_rate`, `attn_layer`, `eps`.
            Others are refused.

    Raises:
        TypeError: for settings that there are not.
        ValueError: for settings that are out of range.
        CheckpointError: a RuntimeError, when weights are loaded that do not fit, by `init_cfg` or as part of a model:
            one of the backbone is missing (kernels excepted) or misshapen, or the file's backbone is of another size.
            That holds for loose loading too, as mmengine's; the backbone's own `load_state_dict(..., strict=False)`
            alone may lack weights.
    """

    loads_strictly = True

    def __init__(
        self,
        arch: str | dict = "tiny",
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        drop_path_rate: float = 0.1,
        init_cfg: dict | list[dict] | None = None,
        **settings,
    ):
        if isinstance(arch, str):
            if arch not in ARCHS:
                raise ValueError(f"arch must be one of {', '.join(ARCHS)} or a dict, got {arch!r}")
            arch = ARCHS[arch]
        if not isinstance(arch, Mapping):
            raise TypeError(f"arch must be a name or a dict, got {arch!r}")
        if lacking := {"dims", "depths", "head_dim"} - arch.keys():
            raise ValueError(f"arch must have dims, depths and head_dim, lacks {', '.join(sorted(lacking))}")
        if clash := sorted(arch.keys() & settings.keys()):
            raise TypeError(f"{', '.join(clash)} cannot be given: arch says it")
        check_integers("arch dims", arch["dims"])
        check_positive("in_channels", in_channels)
        check_bool("with_cp", with_cp)
        stages = len(arch["dims"])
        check_integers("out_indices", out_indices)
        check_integer("frozen_stages", frozen_stages, -1, stages)
        taken = [i + stages if i < 0 else i for i in out_indices]
        if not taken or taken != sorted(set(taken) & set(range(stages))):
            raise ValueError(
                f"out_indices must be rising numbers of the {stages} stages, each once, got {tuple(out_indices)}"
            )
        if "in_chans" in settings:
            raise TypeError("in_chans cannot be given: here it is called in_channels")
        if idle := sorted({"drop_rate", "global_pool", "num_classes"} & settings.keys()):
            raise TypeError(f"{', '.join(idle)} cannot be given: there is no classifier")
        super().__init__(in_chans=in_channels, num_classes=0, drop_path_rate=drop_path_rate, **arch, **settings)
        self.prune_intermediate_layers(taken)
        self.init_cfg = init_cfg
        self.out_indices = tuple(taken)
        self.frozen_stages = frozen_stages
        self.set_grad_checkpointing(with_cp)
        for parameter in self.stages[: max(0, frozen_stages)].parameters():
            parameter.requires_grad = False

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.forward_intermediates(x, list(self.out_indices), intermediates_only=True))

    def train(self, mode: bool = True) -> "FMA2D":
        super().train(mode)
        self.stages[: max(0, self.frozen_stages)].eval()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # mmengine loads models loosely (`load_from`, resume, `init_model`), past `load_state_dict` and by here.
        try:
            if self.loads_strictly:
                check_layout(self, state_dict, prefix)
            super()._load_from_state_dict(state_dict, prefix, *args)
        except RuntimeError as error:
            raise CheckpointError(one_line(error)) from None

    def init_weights(self) -> None:
        init_cfg = self.init_cfg
        given = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        pretrained = [cfg for cfg in given if cfg.get("type") in ("Pretrained", PretrainedInit)]
        if not pretrained or len(pretrained) < len(given):
            self.init_cfg = [cfg for cfg in given if cfg not in pretrained]
            BaseModule.init_weights(self)
            self.init_cfg = init_cfg
        for cfg in pretrained:  # not by mmengine, which takes any file and leaves as it was what the file has not
            self.load_pretrained(**{name: value for name, value in cfg.items() if name != "type"})
        self.is_init = True

    def load_pretrained(self, checkpoint: str, prefix: str | None = None, map_location: str = "cpu") -> None:
        """Take the weights of a file, see `init_cfg`; every backbone weight but kernels must be there and fit."""
        state = read_weights(checkpoint, map_location)
        if prefix is None and any(name.startswith("backbone.") for name in state):
            prefix = "backbone."
        if prefix:
            prefix = prefix.rstrip(".") + "."
            state = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
        stages = tuple(f"stages.{i}." for i in range(len(self.stages)))
        built = {name: weight for name, weight in state.items() if name.startswith(stages)}
        if not built:
            raise CheckpointError(f"{checkpoint} has no weights of an FMA2D backbone (names that start with 'stages.')")
        with fitting(checkpoint):
            self.load_state_dict(built)
        left_out = {".".join(name.split(".")[:2]) for name in state.keys() - built.keys()}
        note = f", left out: {', '.join(sorted(left_out))}" if left_out else ""
        print_log(f"backbone: {len(built)} weights loaded from {checkpoint}{note}", "current", logging.INFO)


def layout(state: Mapping[str, Tensor], prefix: str, stages: int) -> str:
    """The arch that the names and shapes of the weights of a backbone's first stages tell, in words."""
    dims, depths = [], []
    while len(dims) < stages and (norm := state.get(f"{prefix}stages.{len(dims)}.norm.weight")) is not None:
        blocks = f"{prefix}stages.{len(dims)}.blocks."
        depths.append(len({name[len(blocks) :].split(".")[0] for name in state if name.startswith(blocks)}))
        dims.append(len(norm))
    text = f"channels {tuple(dims)} and {tuple(depths)} blocks"
    for name, arch in ARCHS.items():
        if (arch["dims"][: len(dims)], arch["depths"][: len(dims)]) == (tuple(dims), tuple(depths)):
            return f"arch {name!r} ({text})"
    return f"no known arch ({text})"


def check_layout(backbone: FMA2D, state: dict[str, Tensor], prefix: str = "") -> None:
    """Raise RuntimeError if there are weights of another arch than the backbone's: it tells more than names alone."""
    strip_compiled(backbone, state, prefix)
    if not any(name.startswith(prefix) for name in state):
        return
    stages = len(backbone.stages)
    mine, theirs = layout(backbone.state_dict(), "", stages), layout(state, prefix, stages)
    if mine == theirs:
        return
    problem = f"the file is of {theirs}, the model of {mine}"
    try:
        check_state_dict(backbone, state, prefix=prefix)
    except RuntimeError as error:
        raise RuntimeError(f"{problem}: {error}") from None
    raise RuntimeError(problem)


def load_model(model: nn.Module, filename: str) -> None:
    """Load a whole segmentor or detector; a weight that is missing, left over or misshapen is an error.

    Only aggregation kernels are carried over between settings, as everywhere.

    Raises:
        CheckpointError: if the file is not there or does not fit the model.
    """
    state = read_weights(filename)
    with fitting(filename):
        if isinstance(model.backbone, FMA2D):
            check_layout(model.backbone, state, "backbone.")
        check_state_dict(model, state)
        model.load_state_dict(state)
