"""Refuses names in a segmentation config that nothing would read, or whose reader would fail on them, maybe late."""

import difflib
import inspect
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from mmengine import registry
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from tools.ending import InputError

# The top-level settings of a config that mmengine's Runner reads.
RUNNER_KEYS = (
    *("model", "data_preprocessor", "model_wrapper_cfg", "tta_model", "tta_pipeline"),
    *("work_dir", "load_from", "resume"),
    *(f"{split}_{part}" for split in ("train", "val", "test") for part in ("dataloader", "cfg", "evaluator")),
    *("optim_wrapper", "param_scheduler", "auto_scale_lr", "default_hooks", "custom_hooks", "randomness"),
    *("launcher", "env_cfg", "log_processor", "log_level", "visualizer", "vis_backends", "experiment_name"),
    *("default_scope", "custom_imports"),
)
# What stands outside the model: there, a class that takes **kwargs hands them to its base.
REGISTRIES = (
    *(registry.DATASETS, registry.DATA_SAMPLERS, registry.TRANSFORMS, registry.LOOPS, registry.HOOKS),
    *(registry.METRICS, registry.EVALUATOR, registry.OPTIM_WRAPPERS, registry.OPTIMIZERS, registry.PARAM_SCHEDULERS),
    *(registry.VISUALIZERS, registry.VISBACKENDS, registry.LOG_PROCESSORS),
)
# Beside the arguments of a class, mmengine reads these where it builds one.
BUILDER_NAMES = {"type", "_scope_", "priority", "constructor", "paramwise_cfg", "convert_to_iter_based"}
# Settings that no signature tells: what is read there, but by a class of one's own there may be more.
PLAIN_NAMES = {
    "model.test_cfg": {"mode", "crop_size", "stride"},
    "*_dataloader.dataset.data_prefix": {"img_path", "img_path2", "seg_map_path", "depth_map_path"},
    "optim_wrapper.paramwise_cfg": {
        *("custom_keys", "bypass_duplicate", "dcn_offset_lr_mult", "bias_lr_mult", "bias_decay_mult"),
        *("norm_decay_mult", "dwconv_decay_mult", "flat_decay_mult", "decay_rate", "decay_type", "num_layers"),
    },
    "optim_wrapper.paramwise_cfg.custom_keys.*": {"lr_mult", "decay_mult"},
    "auto_scale_lr": {"enable", "base_batch_size"},
    "env_cfg": {"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"},
}


def check_config(cfg: Config, path: Path) -> None:
    """Check a whole config, read from `path`."""
    for key in cfg:
        if key not in RUNNER_KEYS and (close := difflib.get_close_matches(key, RUNNER_KEYS, 1, 0.9)):
            raise InputError(f"{path} sets {key}, which nothing reads; {close[0]} is meant?")
    for key in RUNNER_KEYS:
        if key not in ("model", "tta_model"):  # which say when they are built what they do not take
            check_names(cfg.get(key), key)
    check_inference(cfg)


def check_option(cfg: Config, key: str) -> None:
    """Refuse an option whose place in the config does not exist; the last name may be new, it is checked where read."""
    *parents, _ = names = key.split(".")
    known = [*RUNNER_KEYS, *cfg.keys()]
    if names[0] not in known:
        close = difflib.get_close_matches(names[0], known, 1)
        hint = f"; {close[0]} is meant?" if close else ""
        raise InputError(f"--cfg-options {key}: the config has no {names[0]}{hint}")
    node = cfg
    for depth, name in enumerate(parents):
        if isinstance(node, list | tuple) and name.isdecimal() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict | Config) and name in node:
            node = node[name]
        else:
            raise InputError(f"--cfg-options {key}: the config has no {'.'.join(names[: depth + 1])}")


def check_names(node, place: str) -> None:
    """Refuse names in a part of a config that nothing would read, or whose reader would fail on them, maybe late."""
    if isinstance(node, list | tuple):
        for i, part in enumerate(node):
            check_names(part, f"{place}.{i}")
    if not isinstance(node, dict):
        return
    known, fate, more = names_read(node, place)
    for name, part in node.items():
        if known and name not in known:
            close = difflib.get_close_matches(name, known, 1, 0.8 if more else 0.6)
            if close or not more:
                hint = f"; {close[0]} is meant?" if close else ""
                raise InputError(f"the config sets {place}.{name}, which {fate}{hint}")
        check_names(part, f"{place}.{name}")


def names_read(node: dict, place: str) -> tuple[set[str], str, bool]:
    """The names that may stand in a dict of a config; what becomes of others; whether there may be others all the same.

    No names where nothing is known of the dict.
    """
    if fnmatchcase(place, "*_dataloader"):
        names, _ = arguments(DataLoader.__init__)
        return names | {"num_batch_per_epoch", "disable_subprocess_warning"}, "DataLoader does not take", False
    for pattern, names in PLAIN_NAMES.items():
        if fnmatchcase(place, pattern):
            return names, "nothing reads", True
    kind = find_class(node.get("type"))
    if kind is None:
        return set(), "", True
    known = set(BUILDER_NAMES)
    for base in kind.__mro__[:-1]:
        names, more = arguments(vars(base).get("__init__"))
        known |= names
        if not more:
            break
    _, more = arguments(kind.__init__)
    if kind is CheckpointHook:  # hands on what it does not know when it saves, which is late
        names, more = arguments(Runner.save_checkpoint)
        known |= names - {"filename"}
    return known, f"{kind.__name__} does not take", more


def find_class(kind) -> type | None:
    """The class that a type in a config names, or None."""
    for register in REGISTRIES if isinstance(kind, str) else ():
        with register.switch_scope_and_registry(None) as scoped:
            if found := scoped.get(kind):
                kind = found
                break
    return kind if inspect.isclass(kind) else None


def arguments(function: Callable | None) -> tuple[set[str], bool]:
    """The names of a constructor's arguments, and whether it takes others; None is inherited, and takes its base's."""
    if function is None:
        return set(), True
    if function is object.__init__:
        return set(), False
    parameters = inspect.signature(function).parameters.values()
    more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}, more


def check_inference(cfg: Config) -> None:
    """Refuse a `model.test_cfg` at which the first validation would stop."""
    model = cfg.get("model") or {}
    if not isinstance(model, dict) or not isinstance(test_cfg := model.get("test_cfg") or {}, dict):
        raise InputError("model and model.test_cfg must be dicts")
    check_names(test_cfg, "model.test_cfg")
    mode = test_cfg.get("mode", "whole")
    if mode not in ("whole", "slide", "slide_flip"):
        raise InputError(f"model.test_cfg.mode must be whole or slide, got {mode}")
    if mode != "whole" and not (test_cfg.get("crop_size") and test_cfg.get("stride")):
        raise InputError(
            f"the mode {mode} needs the window and its stride, for example --cfg-options "
            "model.test_cfg.crop_size=128,128 model.test_cfg.stride=96,96"
        )
