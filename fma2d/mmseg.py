"""FMA2D as a backbone of mmsegmentation, mmdetection and whatever else builds models from mmengine's registry.

A config needs `custom_imports = dict(imports=["fma2d.mmseg"])`. That registers the backbone `FMA2D`, and lets every
place that takes a checkpoint (`init_cfg`, `load_from`, `init_model`) take a safetensors file too. A program that reads
this project's configs imports it first: see `MODULE2PACKAGE` below.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten

import numpy as np
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.model import BaseModule, PretrainedInit
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from mmengine.runner import checkpoint as runner_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors import safe_open
from torch import Tensor, nn

from .backbone import FMA2DBackbone
from .checkpoint import check_state_dict, describe
from .models import ARCHS

# mmengine finds `_base_ = ["mmseg::..."]` by the distribution, which the maintained continuation has renamed; a name
# that is no distribution it looks up as a module.
try:
    metadata.distribution(MODULE2PACKAGE["mmseg"])
except metadata.PackageNotFoundError:
    MODULE2PACKAGE["mmseg"] = "mmseg"


class CheckpointError(RuntimeError, ValueError):
    """A file of weights that is not there, cannot be read or does not fit the model; its text says why, in one line."""


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

    may_lack = False

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
        stages = len(arch["dims"])
        if not isinstance(out_indices, Sequence):
            raise TypeError(f"out_indices must be a sequence of stages, got {out_indices!r}")
        taken = [i + stages if i < 0 else i for i in out_indices]
        if not taken or taken != sorted(set(taken) & set(range(stages))):
            raise ValueError(
                f"out_indices must be rising numbers of the {stages} stages, each once, got {tuple(out_indices)}"
            )
        if "in_chans" in settings:
            raise TypeError("in_chans cannot be given: here it is called in_channels")
        if idle := sorted({"drop_rate", "global_pool", "num_classes"} & settings.keys()):
            raise TypeError(f"{', '.join(idle)} cannot be given: there is no classifier")
        if not -1 <= frozen_stages <= stages:
            raise ValueError(f"frozen_stages must be from -1 to {stages}, got {frozen_stages}")
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

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False):
        self.may_lack = not strict
        try:
            return super().load_state_dict(state_dict, strict, assign)
        finally:
            self.may_lack = False

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # mmengine loads models loosely (`load_from`, resume, `init_model`), past `load_state_dict` and by here.
        try:
            if not self.may_lack:
                check_layout(self, state_dict, prefix)
                check_state_dict(self, state_dict, prefix=prefix)
        except RuntimeError as error:
            raise CheckpointError(one_line(error)) from None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def init_weights(self) -> None:
        init_cfg = self.init_cfg
        given = [init_cfg] if isinstance(init_cfg, dict) else init_cfg or []
        pretrained = [cfg for cfg in given if cfg.get("type") in ("Pretrained", PretrainedInit)]
        if not pretrained or len(pretrained) < len(given):
            self.init_cfg = [cfg for cfg in given if cfg not in pretrained]
            super().init_weights()
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
            check_layout(self, built)
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


def check_layout(backbone: FMA2D, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise RuntimeError if there are weights of another arch than the backbone's: it tells more than names alone."""
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


@contextmanager
def fitting(filename: str) -> Iterator[None]:
    """Turn what the loading of weights from a file raises into a `CheckpointError`."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(f"{filename} does not fit: {one_line(error)}") from None


@CheckpointLoader.register_scheme(prefixes=r".*\.safetensors$")
def load_from_safetensors(filename: str, map_location: str | None = None) -> dict:
    """A safetensors file as mmengine's checkpoints are: `state_dict`, and its metadata as `meta`."""
    with safe_open(filename, "pt", device=str(map_location or "cpu")) as file:
        names = file.keys()  # the file itself cannot be iterated over
        return dict(state_dict={name: file.get_tensor(name) for name in names}, meta=file.metadata() or {})


def load_tensors(filename: str, map_location: str):
    """A file of torch.save under `weights_only=True`, where mmengine would run its code; a log's history is allowed."""
    allowed = [*getattr(runner_checkpoint, "get_torch_safe_globals", list)(), HistoryBuffer]
    safe_globals = getattr(torch.serialization, "safe_globals", lambda _: nullcontext())  # from torch 2.5 on
    with safe_globals(allowed):
        return torch.load(filename, map_location=map_location, weights_only=True)


def read_weights(filename: str, map_location: str = "cpu") -> dict[str, Tensor]:
    """The state dict in a file, out of what it may be wrapped in; weights averaged beside it (EMA) are not taken.

    Raises:
        CheckpointError: if the file is not there or none of weights.
    """
    is_pickle = Path(filename).is_file() and not filename.endswith(".safetensors")
    try:
        checkpoint = (load_tensors if is_pickle else CheckpointLoader.load_checkpoint)(filename, map_location)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {filename} to take weights from") from None
    except UnpicklingError:
        raise CheckpointError(
            f"{filename} is not a checkpoint of tensors and plain values; what else a file holds could run code, so it "
            "is not loaded"
        ) from None
    except Exception as error:  # whatever unpickling a foreign file raises
        raise CheckpointError(f"{filename} is not a checkpoint: {one_line(error)}") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{filename} holds no state dict but a {type(checkpoint).__name__}")
    for wrapper in ("state_dict", "model"):
        if isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    return {name.removeprefix("module."): weight for name, weight in checkpoint.items()}


def one_line(error: Exception) -> str:
    """What an exception says, or its name if it says nothing; torch may name each weight on a line of its own."""
    return shorten(str(error) or type(error).__name__, 600)


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


@HOOKS.register_module()
class PlainCheckpoints(Hook):
    """Has mmengine write checkpoints that load under `weights_only=True` and tell the model's settings.

    numpy's values become Python's own types and the log's history tensors; resuming with this hook restores the
    history, without it the history is dropped. `meta["fma2d"]` holds what the metadata of `save_checkpoint` does.
    """

    priority = "LOWEST"  # comes after the hooks that add something

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["meta"]["fma2d"] = describe(runner.model)
        for name in checkpoint:
            if not name.endswith("state_dict"):  # tensors already, and torch's notes with them
                checkpoint[name] = plain(checkpoint[name])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if isinstance(hub := checkpoint.get("message_hub"), dict):
            for name, value in hub["log_scalars"].items():
                if isinstance(value, dict):
                    hub["log_scalars"][name] = HistoryBuffer(*(value[part].cpu().numpy() for part in ("log", "count")))


def plain(value):
    """What `weights_only=True` loads, in place of mmengine's and numpy's types."""
    if isinstance(value, HistoryBuffer):
        log, count = value.data
        return dict(log=torch.from_numpy(log), count=torch.from_numpy(count))
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value
