"""What tools/train.py, tools/test.py and tools/predict.py share: reading a config, fitting it to the machine, checks.

Whatever is wrong with what the user gave is an `InputError` of one line, raised before any work is done.
"""

import difflib
import inspect
import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from mmengine import registry
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.utils import register_all_modules
from torch.utils.data import DataLoader

import fma2d.mmseg
from tools.check_dataset import IGNORED, check_split
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
SAMPLE = 64  # pairs of image and annotation read before a run


class Options(DictAction):
    """KEY=VALUE words; anything else is the usage and one line."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if wrong := [value for value in values if "=" not in value]:
            parser.error(f"--cfg-options takes KEY=VALUE, got {wrong[0]}")
        super().__call__(parser, namespace, values, option_string)


def add_options(parser: ArgumentParser) -> None:
    """Add `--cfg-options`."""
    parser.add_argument(
        "--cfg-options", nargs="+", action=Options, metavar="KEY=VALUE", help="settings put into the config"
    )


def read_config(path: Path, options: dict | None = None) -> Config:
    """A config with the options of the command line in it."""
    if not path.is_file():
        raise InputError(f"there is no config {path}")
    register_all_modules(init_default_scope=False)
    try:
        cfg = Config.fromfile(str(path))
    except (KeyError, TypeError, ValueError, AttributeError, NameError, SyntaxError, OSError, ImportError) as error:
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {first_line(error)}") from error
    known = [*RUNNER_KEYS, *cfg.keys()]
    for key in options or {}:
        check_option(cfg, key, known)
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError) as error:
        raise InputError(f"the --cfg-options do not fit {path}: {first_line(error)}") from error
    for key in cfg:
        if key not in RUNNER_KEYS and (close := difflib.get_close_matches(key, RUNNER_KEYS, 1, 0.9)):
            raise InputError(f"{path} sets {key}, which nothing reads; {close[0]} is meant?")
    init_default_scope(cfg.get("default_scope", "mmseg"))
    for key in RUNNER_KEYS:
        if key not in ("model", "tta_model"):  # which say when they are built what they do not take
            check_names(cfg.get(key), key)
    check_inference(cfg)
    return cfg


def check_option(cfg: Config, key: str, known: list[str]) -> None:
    """Refuse an option whose place in the config does not exist; the last name may be new, it is checked where read."""
    *parents, _ = names = key.split(".")
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


def fit_to_machine(cfg: Config, launcher: str, amp: bool = False) -> None:
    """Make one config run on a CPU, on one GPU and on many, and say what was changed.

    SyncBN stays for several CUDA processes only; without CUDA the processes talk by gloo.
    """
    cuda = torch.cuda.is_available()
    if amp:
        if not cuda:
            raise InputError("--amp needs a CUDA device, and there is none here; leave it out")
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")
    cfg.launcher = launcher
    if launcher == "pytorch" and "RANK" not in os.environ:
        raise InputError("--launcher pytorch is for torchrun: tools/dist_train.sh CONFIG PROCESSES")
    processes = int(os.environ.get("WORLD_SIZE", 1)) if launcher == "pytorch" else 1
    keep = cuda and processes > 1
    if count := replace_sync_bn(cfg.model, keep):
        done = "kept in {} places, for" if keep else "replaced by BN in {} places, as it needs"
        print(f"SyncBN: {done.format(count)} several CUDA processes")
    if launcher == "pytorch" and not cuda:
        # mmengine would ask for a CUDA device whatever the backend; a group that exists it takes as it is.
        torch.distributed.init_process_group("gloo")
        cfg.env_cfg.dist_cfg.backend = "gloo"
        cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None, broadcast_buffers=False)
        print(f"no CUDA: process {os.environ['RANK']} of {processes} on the CPU, by gloo")


def replace_sync_bn(node, keep: bool = False) -> int:
    """Turn each SyncBN in a config into BN, unless they are to be kept; how many there were."""
    if isinstance(node, list | tuple):
        return sum(replace_sync_bn(part, keep) for part in node)
    if not isinstance(node, dict):
        return 0
    count = sum(replace_sync_bn(part, keep) for part in node.values())
    if node.get("type") in ("SyncBN", "MMSyncBN"):
        node["type"] = node["type"] if keep else "BN"
        count += 1
    return count


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Raise `InputError` unless the data of these splits ("train", "val", "test") is there, and a sample of it sound.

    And unless the model's heads have as many classes as the data.
    """
    for split in splits:
        dataset_cfg = cfg[f"{split}_dataloader"].dataset
        if "dataset" in dataset_cfg or "datasets" in dataset_cfg or dataset_cfg.get("ann_file"):
            print(f"{split} data: not checked, as it is made of others or has a list of files")
            continue
        with building(f"{split}_dataloader.dataset"):
            report = check_split(dataset_cfg, split, SAMPLE)
        if report.problems:
            raise InputError(
                f"the {split} data is not as it should be: {'; '.join(report.problems)} "
                "(python tools/check_dataset.py CONFIG reads all of it)"
            )
        for name in ("decode_head", "auxiliary_head"):
            heads = cfg.model.get(name) or []
            for head in heads if isinstance(heads, list | tuple) else [heads]:
                if report.classes and head.get("num_classes", report.classes) != report.classes:
                    raise InputError(
                        f"model.{name}.num_classes is {head.num_classes}, the {split} data has {report.classes} classes"
                    )
        print(f"{split} data: {report.images} images, {report.read} of them read, all well")


def annotation_labels(dataset: BaseSegDataset) -> np.ndarray:
    """The label that each class of a model has in annotation files, uint8; a config may ask for some classes only."""
    label_map = dataset.label_map or {i: i for i in range(len(dataset.metainfo["classes"]))}
    stored = {new: old for old, new in label_map.items() if new != IGNORED}
    return np.array([stored[i] for i in range(len(stored))], np.uint8) + np.uint8(dataset.reduce_zero_label)


def build_runner(cfg: Config, train: bool) -> Runner:
    """A runner with its model and all else that a mistake in the config could stop."""
    with building("the model or a hook"):
        runner = Runner.from_cfg(cfg)
    if not train:
        with building("test_dataloader, test_cfg or test_evaluator"):
            _ = runner.test_loop
        return runner
    with building("train_dataloader or train_cfg"):
        _ = runner.train_loop
    with building("val_dataloader, val_cfg or val_evaluator"):
        _ = runner.val_loop
    with building("optim_wrapper"):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    with building("auto_scale_lr or param_scheduler"):
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        runner.auto_scale_lr = None  # done, and not again by train()
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.register_hook(fma2d.mmseg.PlainCheckpoints())
    return runner


@contextmanager
def building(part: str) -> Iterator[None]:
    """Turn what goes wrong while a part of the config is built into an `InputError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        line = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the config is wrong, {part} cannot be built: {line}") from error


def first_line(error: Exception) -> str:
    """Of an error's text; mmengine wraps one error into another and repeats tracebacks in their texts."""
    return next(iter(str(error.args[0] if error.args else error).strip().splitlines()), "")
