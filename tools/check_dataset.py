"""Checks a data set of a segmentation config: folders, pairs of image and annotation, sizes, labels.

Files are listed and loaded by the config's own data set and pipeline, so what is checked is what training sees.
Without a config, ADE20K in its usual place, data/ade/ADEChallengeData2016. Every file is read unless --sample says how
many. Ends with 1 when something is wrong, and says what to do.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from tqdm import tqdm

from tools.arguments import positive
from tools.ending import InputError, ending

DEFAULT = Path(__file__).resolve().parents[1] / "configs/ade20k/segformer_fma2d-nano_8xb2-160k_ade20k-512x512.py"
SHOWN = 5  # files named per kind of problem
IGNORED = 255  # a label that counts nowhere, unless the config says another
ORIENTATION = 0x0112  # the tag of EXIF


@dataclass
class Report:
    """What was found in one split, or in one of the data sets that it is made of.

    `problems` is empty when all is well; `pixels[label]` counts those read, labels as the model is to learn them.
    """

    name: str
    classes: list[str] = field(default_factory=list)
    images: int = 0
    read: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    ignored: int = IGNORED

    @property
    def shares(self) -> dict[int, float]:
        """Of each class that occurs, the share of all pixels but the ignored ones; the largest first."""
        counts = self.counts
        return {int(i): counts[i] / counts.sum() for i in np.argsort(-counts, kind="stable") if counts[i]}

    @property
    def counts(self) -> np.ndarray:
        """`pixels` of the classes."""
        counts = self.pixels[: len(self.classes)].copy()
        if self.ignored < len(counts):
            counts[self.ignored] = 0
        return counts


def check_data_sets(cfg: Config, split: str, sample: int | None = None, progress: bool = False) -> list[Report]:
    """Check the data of "train", "val" or "test" in a config: a report on each data set that wrappers put together.

    `sample` and `progress` are those of `check_split`.
    """
    # What is ignored the loss says in training, and the metric in validation.
    judge = (cfg.model.get("decode_head") if split == "train" else cfg.get(f"{split}_evaluator")) or {}
    judges = judge if isinstance(judge, list | tuple) else [judge]
    ignored = next((one["ignore_index"] for one in judges if "ignore_index" in one), IGNORED)
    whole = f"{split}_dataloader.dataset"
    parts = list(data_sets(cfg[f"{split}_dataloader"].dataset, whole))
    least = 1 if split == "test" else 2
    return [
        check_split(
            part, split + place.removeprefix(whole), sample, progress, place=place, ignored=ignored, least=least
        )
        for place, part in parts
    ]


def data_sets(cfg: dict, place: str) -> Iterator[tuple[str, dict]]:
    """The data sets of files that one of a config is made of, with their places in it: itself, or what it wraps."""
    if "datasets" in cfg:
        for i, part in enumerate(cfg["datasets"]):
            yield from data_sets(part, f"{place}.datasets.{i}")
    elif isinstance(cfg.get("dataset"), dict):
        yield from data_sets(cfg["dataset"], f"{place}.dataset")
    else:
        yield place, cfg


def check_split(
    dataset_cfg: dict,
    name: str,
    sample: int | None = None,
    progress: bool = False,
    *,
    place: str | None = None,
    ignored: int = IGNORED,
    least: int = 2,
) -> Report:
    """Check one data set of files.

    Args:
        dataset_cfg: what the config says of it.
        name: for the report.
        sample: read this many pairs, drawn with a fixed seed, instead of all; more where they show one class only.
        progress: show a bar.
        place: of the data set in the config.
        ignored: the label that does not count.
        least: so many classes must occur.
    """
    report = Report(name, ignored=ignored)
    place = place or f"{name}_dataloader.dataset"
    dataset = DATASETS.build(dict(dataset_cfg, lazy_init=True))
    if not isinstance(dataset, BaseSegDataset):
        report.notes.append(f"not checked, as {type(dataset).__name__} is no BaseSegDataset")
        return report
    report.classes = [str(name).strip() for name in dataset.metainfo.get("classes") or ()]
    if not report.classes:
        report.problems.append(f"{place} names no classes: metainfo=dict(classes=(...), palette=[...])")
        return report
    if problem := find_files(dataset, place):
        report.problems.append(problem)
        return report
    report.images = len(dataset)
    report.notes += [] if sample else unused_annotations(dataset)
    loaders = [step for step in dataset.pipeline.transforms if type(step).__name__.startswith("Load")]
    order = np.random.default_rng(0).permutation(report.images) if sample else np.arange(report.images)
    found: dict[str, list[str]] = {}
    for i in tqdm(order, desc=name, unit="pair", disable=not progress, dynamic_ncols=True):
        if sample and report.read >= sample and len(report.shares) >= min(least, len(report.classes)):
            break  # a rare class may be on none of the first few
        info = dataset.get_data_info(int(i))
        image, annotation = Path(info["img_path"]), Path(info.get("seg_map_path") or "")
        if problem := check_pair(image, annotation, len(report.classes), report.pixels, loaders, info, ignored):
            file = os.path.relpath(image, dataset.data_prefix.get("img_path") or ".")
            found.setdefault(problem, []).append(os.path.splitext(file)[0])
        report.read += 1
    report.problems += [some(problem, names) for problem, names in found.items()]
    if not found:
        report.problems += check_labels(report, dataset, least)
    return report


def find_files(dataset: BaseSegDataset, place: str) -> str | None:
    """Have the data set list its files; what stops it."""
    prefixes = dataset.data_prefix or {}
    folders = [Path(prefixes[key]) for key in ("img_path", "seg_map_path") if prefixes.get(key)]
    remote = dataset.backend_args or any("://" in str(prefix) for prefix in prefixes.values())
    if missing := [folder for folder in folders if not remote and not folder.is_dir()]:
        return (
            f"there is no folder {' and no '.join(map(str, missing))}; docs/segmentation.md says what belongs there; "
            f"--cfg-options {place}.data_root=FOLDER names another place"
        )
    listed = dataset.ann_file
    if listed and not remote and not Path(listed).exists():
        return f"there is no list of files {listed}, which {place}.ann_file names"
    dataset.serialize_data = False  # which fails where there is nothing to serialize
    dataset.full_init()
    if len(dataset):
        return None
    if listed:
        return f"{listed} lists no image"
    others = sorted({path.suffix for path in folders[0].rglob("*.*")}) if folders and not remote else []
    found = f", only {', '.join(others)}" if others else ""
    return f"{folders[0] if folders else place} holds no image whose name ends with {dataset.img_suffix}{found}"


def unused_annotations(dataset: BaseSegDataset) -> list[str]:
    """A note on annotations that belong to no image, where a folder holds those of one data set only."""
    folder = Path((dataset.data_prefix or {}).get("seg_map_path") or "nowhere")
    if dataset.ann_file or dataset.backend_args or not folder.is_dir():
        return []
    used = {Path(dataset.get_data_info(i).get("seg_map_path") or "") for i in range(len(dataset))}
    names = [p.stem for p in folder.rglob(f"*{dataset.seg_map_suffix}") if p not in used and not p.name.startswith(".")]
    return [some("annotation without image, which nothing reads", names)] if names else []


def check_pair(
    image: Path,
    annotation: Path,
    classes: int,
    pixels: np.ndarray,
    loaders: Sequence[BaseTransform] | None = None,
    info: dict | None = None,
    ignored: int = IGNORED,
) -> str | None:
    """What is wrong with an image and its annotation, or None; counts the labels into `pixels`.

    Args:
        classes: how many there are.
        loaders: the steps of a pipeline that load the two; mmsegmentation's own.
        info: what the data set says of the pair.
    """
    label_map, reduced = (info or {}).get("label_map"), bool((info or {}).get("reduce_zero_label"))
    start = dict(label_map=label_map, reduce_zero_label=reduced, seg_fields=[])
    results = start | (info or {}) | dict(img_path=str(image), seg_map_path=str(annotation))
    for step in loaders or (LoadImageFromFile(), LoadAnnotations()):
        kind = "annotation" if "img" in results else "image"
        try:
            results = step(results)
        except FileNotFoundError:
            return "image without annotation" if kind == "annotation" else "image that is listed and not there"
        except Exception as error:  # the decoders raise almost anything
            if "reduce_zero_label" in str(error):
                return f"annotation that its loader refuses: {first_line(error)}"
            if too_large(error):
                return f"{kind} that is too large to be read (cut it into parts)"
            return f"{kind} that cannot be read (download or copy it again)"
        if results is None:
            return f"{kind} that its loader, {type(step).__name__}, leaves out"
    labels = results.get("gt_seg_map")
    if labels is None or "img" not in results:
        return None  # there is nothing to learn from it: a pipeline that loads no annotation
    if problem := check_bits(annotation, labels):
        return problem
    turned = turns(image, loaders)
    if labels.shape != results["img"].shape[:2]:
        hint = " (the image's EXIF tag turns it, not its annotation: write both upright)" if turned else ""
        return f"annotation of another size than its image{hint}"
    # Of a photo that is turned by a quarter and not square, the size has just told that its annotation is upright too.
    if turned and (turned < 5 or labels.shape[0] == labels.shape[1]):
        return (
            "image that its EXIF tag turns in training, while nothing tells whether its annotation is upright: write "
            "both upright, without the tag"
        )
    counts = np.bincount(labels.reshape(-1), minlength=256)
    pixels += counts
    counts[ignored] = 0
    if (beyond := np.flatnonzero(counts[classes:])).size:
        # As the file has it: with reduce_zero_label 0 is "other" and the classes count from 1.
        last = len(label_map or range(classes)) - 1 + reduced
        first = classes + beyond[0]
        white = f"; for two classes write 0 and 1, as {IGNORED} is ignored" if first == IGNORED and classes == 2 else ""
        return f"annotation with a label beyond {last}, such as {first + (reduced and first < IGNORED)}" + (
            white or " (another label set?)"
        )
    return None


def check_bits(annotation: Path, labels: np.ndarray) -> str | None:
    """What is wrong with the kind of an annotation file: the loader makes 8 bits of whatever a file holds."""
    problem = "annotation that is not one channel of 8 bits (one label a pixel is asked for, no colours)"
    if labels.ndim != 2:
        return problem
    try:
        with Image.open(annotation) as image:
            if image.mode in ("1", "L", "P"):
                return None
            values = np.asarray(image)
    except (OSError, ValueError, SyntaxError):  # of a kind that only the loader reads
        return None
    return problem if values.ndim != 2 or not np.isin(values, np.arange(256)).all() else None


def too_large(error: Exception) -> bool:
    """Whether that is why an image could not be read: Pillow's limit of pixels, OpenCV's, or that of the memory."""
    return isinstance(error, Image.DecompressionBombError | MemoryError) or "CV_IO_MAX_IMAGE" in str(error)


def turns(image: Path, loaders: Sequence[BaseTransform] | None) -> int:
    """The EXIF orientation, 2 to 8, by which a pipeline turns an image when it loads it; 0 if it does not."""
    for step in loaders or ():
        if hasattr(step, "color_type") and not (
            step.color_type in ("color", "grayscale") and step.imdecode_backend in (None, "cv2", "pillow")
        ):
            return 0
    try:
        with Image.open(image) as file:
            tag = file.getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0
    return tag if tag in range(2, 9) else 0


def check_labels(report: Report, dataset: BaseSegDataset, least: int) -> list[str]:
    """What is wrong with the labels that occur."""
    total, ignored, shares = report.pixels.sum(), report.pixels[report.ignored], report.shares
    if not total or len(shares) >= min(least, len(report.classes)):
        return []
    first = int(dataset.reduce_zero_label)
    label = f"0 or {IGNORED}" if first else str(report.ignored)
    if not shares:
        return [
            f"every pixel of the {report.read} annotations read is {label}, which is ignored: nothing can be learned"
        ]
    [only] = shares
    hint = ""
    if ignored and not dataset.label_map:
        hint = f"; {ignored / total:.0%} of all pixels are {label}, which is ignored (the classes count from {first})"
    return [
        f"of {len(report.classes)} classes only {report.classes[only]} (label {only + first}) occurs in the "
        f"{report.read} annotations read{hint}"
    ]


def first_line(error: Exception) -> str:
    """Of an error's text; mmengine wraps one error into another and repeats tracebacks in their texts."""
    text = error.args[0] if error.args and not isinstance(error, OSError) else error
    return next(iter(str(text).strip().splitlines()), "")


def some(problem: str, names: Iterable[str]) -> str:
    """A problem that files have, some of them by name."""
    names = sorted(names)
    dots = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} x {problem}: {', '.join(names[:SHOWN])}{dots}"


def occurring(report: Report, most: int | None = None) -> str:
    """Which classes occur, and how often: `sky 31.2 %, road 20.4 %`, and how many there are."""
    shares = list(report.shares.items())
    parts = [f"{report.classes[i]} {share:.2%}" for i, share in shares[:most]]
    return f"{len(shares)} of {len(report.classes)} classes occur: {', '.join(parts)}" + (
        ", ..." if most and len(shares) > most else ""
    )


def describe(report: Report) -> str:
    """The report in some lines."""
    lines = [f"{report.name}: {report.images} images, {report.read} of them read with their annotations"]
    if total := report.pixels.sum():
        lines.append(f"  {occurring(report)}")
        lines.append(f"  ignored (label {report.ignored}): {report.pixels[report.ignored] / total:.2%} of all pixels")
    lines += [f"  note: {note}" for note in report.notes]
    lines += [f"  WRONG: {problem}" for problem in report.problems]
    return "\n".join(lines)


@ending()
def main(argv: list[str] | None = None) -> int:
    """Check the training and the validation set of a config; 1 if something is wrong."""
    from tools.mmseg_runs import building, read_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=DEFAULT, help="default: ADE20K")
    parser.add_argument("--data-root", help="folder of the data set (the config's)")
    parser.add_argument("--sample", type=positive, help="pairs to read of each split (all)")
    args = parser.parse_args(argv)
    cfg = read_config(args.config)
    wrong = False
    for split in ("train", "val"):
        place = f"{split}_dataloader"
        if not (cfg.get(place) or {}).get("dataset"):
            raise InputError(f"{args.config} has no {place}.dataset")
        if args.data_root:
            for _, part in data_sets(cfg[place].dataset, place):
                part["data_root"] = args.data_root
        with building(f"{place}.dataset"):
            for report in check_data_sets(cfg, split, args.sample, progress=True):
                print(describe(report))
                wrong |= bool(report.problems)
    print("something is wrong, see above" if wrong else "all well")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
