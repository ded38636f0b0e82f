"""What tools/train.py, tools/test.py and tools/predict.py share: reading a config, fitting it to the machine, checks.

Whatever is wrong with what the user gave is an `InputError` of one line, raised before any work is done.
"""

import os
import re
import zipfile
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner import BaseLoop, Runner
from mmseg.datasets import BaseSegDataset
from mmseg.evaluation import IoUMetric
from mmseg.utils import register_all_modules

import fma2d.mmseg
from tools.check_dataset import IGNORED, Report, check_data_sets, check_pair, data_sets, first_line, occurring
from tools.config_names import check_config, check_option
from tools.ending import InputError

SAMPLE = 64  # pairs of image and annotation read before a training


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
    for key in options or {}:
        check_option(cfg, key)
    try:
        cfg.merge_from_dict(options or {})
    except (KeyError, TypeError) as error:
        raise InputError(f"the --cfg-options do not fit {path}: {first_line(error)}") from error
    init_default_scope(cfg.get("default_scope", "mmseg"))
    check_config(cfg, path)
    return cfg


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
        if not cfg.get(f"{split}_dataloader"):
            continue
        with building(f"{split}_dataloader.dataset"):
            # A test is no longer than the reading of its data by much, and what it has measured is lost with it.
            reports = check_data_sets(cfg, split, None if split == "test" else SAMPLE, progress=split == "test")
        for report in reports:
            if report.problems:
                raise InputError(
                    f"the {report.name} data is not as it should be: {'; '.join(report.problems)} "
                    "(python tools/check_dataset.py CONFIG reads all of it)"
                )
            check_classes(cfg, report)
            facts = [f"{report.images} images, {report.read} of them read", *report.notes]
            facts += [occurring(report, 5)] if report.pixels.any() else []
            print(f"{report.name} data: {'; '.join(facts)}")


def check_classes(cfg: Config, report: Report) -> None:
    """Raise `InputError` unless the model's heads have as many classes as the data."""
    classes = len(report.classes)
    for name in ("decode_head", "auxiliary_head"):
        heads = cfg.model.get(name) or []
        for head in heads if isinstance(heads, list | tuple) else [heads]:
            if classes and head.get("num_classes", classes) != classes:
                raise InputError(
                    f"model.{name}.num_classes is {head.num_classes}, the {report.name} data has {classes} classes"
                )


def files_of(cfg: Config) -> list[BaseSegDataset]:
    """The data sets of files that the test data is made of, not listed yet."""
    parts = data_sets(cfg.test_dataloader.dataset, "test_dataloader.dataset")
    return [DATASETS.build(dict(part, lazy_init=True)) for _, part in parts]


def annotation_labels(dataset: BaseSegDataset) -> np.ndarray:
    """The label that each class of a model has in annotation files, uint8; a config may ask for some classes only."""
    label_map = dataset.label_map or {i: i for i in range(len(dataset.metainfo["classes"]))}
    stored = {new: old for old, new in label_map.items() if new != IGNORED}
    return np.array([stored[i] for i in range(len(stored))], np.uint8) + np.uint8(dataset.reduce_zero_label)


def result_names(images: Sequence[Path]) -> dict[Path, Path]:
    """Where the results of each image go in a folder of results, without suffix.

    By the image's name; with its folders, below the one that all have in common, where names are equal; and with its
    suffix where only that tells two apart.
    """
    images = list(dict.fromkeys(images))
    whole = [Path(os.path.abspath(image)) for image in images]
    top = os.path.commonpath([path.parent for path in whole]) if whole else ""
    below = [path.relative_to(top) for path in whole]
    names = [Path(path.stem) for path in below]
    for other in ([path.with_suffix("") for path in below], below):
        if len(set(names)) < len(set(whole)):
            names = other
    return dict(zip(images, names, strict=True))


def build_runner(cfg: Config, train: bool) -> Runner:
    """A runner with its model and all else that a mistake in the config could stop."""
    with building("the model or a hook"):
        runner = Runner.from_cfg(cfg)
    if not train:
        with building("test_dataloader, test_cfg or test_evaluator"):
            metric_names(runner.test_loop)
        return runner
    with building("train_dataloader or train_cfg"):
        name_bad_files(runner.train_loop.dataloader.dataset)
    with building("val_dataloader, val_cfg or val_evaluator"):
        names = metric_names(runner.val_loop) if runner.val_loop else []
    for hook in runner.hooks:
        best = (hook.save_best or []) if isinstance(hook, CheckpointHook) and names else []
        if unknown := set(best) - {"auto", *names}:
            raise InputError(f"save_best is {unknown.pop()}, which is not measured; that is {', '.join(names)}")
    with building("optim_wrapper"):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    with building("auto_scale_lr or param_scheduler"):
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        runner.auto_scale_lr = None  # done, and not again by train()
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.register_hook(fma2d.mmseg.PlainCheckpoints())
    runner.register_hook(OwnFolder())
    return runner


def name_bad_files(dataset) -> None:
    """Have a pair that cannot be loaded, of the data sets of files in this one, end the training in a line of names."""
    for part in getattr(dataset, "datasets", [getattr(dataset, "dataset", None)]):
        if part is not None:
            name_bad_files(part)
    if isinstance(dataset, BaseSegDataset):
        dataset.pipeline = NamedPipeline(dataset)


class NamedPipeline:
    """The pipeline of a data set; what cannot be loaded is an `InputError` that names the file."""

    def __init__(self, dataset: BaseSegDataset):
        self.pipeline, self.transforms = dataset.pipeline, dataset.pipeline.transforms
        self.classes = len(dataset.metainfo.get("classes") or ())

    def __call__(self, info: dict) -> dict | None:
        given = dict(info)
        try:
            return self.pipeline(info)
        except Exception:  # the decoders raise almost anything
            image, annotation = Path(given["img_path"]), Path(given.get("seg_map_path") or "")
            loaders = [step for step in self.transforms if type(step).__name__.startswith("Load")]
            problem = check_pair(image, annotation, self.classes, np.zeros(256, int), loaders, given)
            if problem is None:
                raise
            raise InputError(f"{image} has an {problem}" if problem[0] == "a" else f"{image} is an {problem}") from None


class OwnFolder(Hook):
    """Has a run that goes on in a moved or copied folder take its best checkpoint for the one there.

    A checkpoint holds whole paths, and mmengine removes the best one when there is a better: the original's, that is.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        facts = (checkpoint.get("message_hub") or {}).get("runtime_info", {})
        folders = {hook.out_dir for hook in runner.hooks if isinstance(hook, CheckpointHook)} - {None, runner.work_dir}
        for name in facts:
            if name.startswith("best_ckpt") and isinstance(facts[name], str) and not folders:
                facts[name] = str(Path(runner.work_dir) / file_name(facts[name]))


def file_name(path: str) -> str:
    """The last part of a path, of whatever system it was written on."""
    return re.split(r"[/\\]", path.strip())[-1]


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run in a folder goes on from: what `last_checkpoint` names, else the newest whole one.

    The file holds a whole path, which after a move or in a copy is another folder's, and only the name counts. A kill
    or a full disk may have left it empty or cut, as well as a checkpoint.
    """
    note, names = folder / "last_checkpoint", []
    if note.is_file():
        names.append(file_name(note.read_text(errors="replace")))
    written = [match for path in folder.glob("*.pth") if (match := re.fullmatch(r"(iter|epoch)_(\d+)\.pth", path.name))]
    names += [match[0] for match in sorted(written, key=lambda match: -int(match[2]))]
    for name in dict.fromkeys(filter(None, names)):
        path = folder / name
        if path.is_file() and zipfile.is_zipfile(path):
            return path
        if path.exists():
            print(f"{path} is not whole and is passed over")
    return None


def metric_names(loop: BaseLoop) -> list[str]:
    """What a loop measures, found by measuring one right pixel; empty where others than mmseg's `IoUMetric` measure.

    Raises:
        KeyError: for a metric that does not exist, at which the first evaluation would stop.
    """
    names, pixel = [], torch.ones(1)
    for metric in loop.evaluator.metrics:
        if type(metric) is not IoUMetric or metric.format_only:
            return []
        scores = metric.total_area_to_metrics(pixel, pixel, pixel, pixel, metric.metrics)
        prefix = f"{metric.prefix}/" if metric.prefix else ""
        names += [prefix + (name if name == "aAcc" else f"m{name}") for name in scores]
    return names


@contextmanager
def building(part: str) -> Iterator[None]:
    """Turn what goes wrong while a part of the config is built into an `InputError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, FileNotFoundError) as error:
        line = f"{type(error).__name__}: {first_line(error)}"
        raise InputError(f"the config is wrong, {part} cannot be built: {line}") from error
