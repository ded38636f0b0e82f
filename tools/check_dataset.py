"""Checks a data set of a segmentation config: folders, pairs of image and annotation, sizes, labels.

Without a config, ADE20K in its usual place, data/ade/ADEChallengeData2016. Every file is read unless --sample says how
many. Ends with 1 when something is wrong, and says what to do.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from mmengine.registry import DATASETS
from PIL import Image
from tqdm import tqdm

from tools.ending import ending

DEFAULT = Path(__file__).resolve().parents[1] / "configs/ade20k/segformer_fma2d-nano_8xb2-160k_ade20k-512x512.py"
SHOWN = 5  # files named per kind of problem
IGNORED = 255  # a label that counts nowhere, whatever the number of classes


@dataclass
class Report:
    """What was found in one split. `problems` is empty when all is well; `pixels[label]` counts those read."""

    name: str
    classes: int = 0
    images: int = 0
    annotations: int = 0
    read: int = 0
    problems: list[str] = field(default_factory=list)
    pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))


def check_split(dataset_cfg: dict, name: str, sample: int | None = None, progress: bool = False) -> Report:
    """Check one data set of a config.

    Args:
        dataset_cfg: what the config says under `dataset`.
        name: for the report.
        sample: read this many pairs, drawn with a fixed seed, instead of all.
        progress: show a bar.
    """
    report = Report(name)
    dataset = DATASETS.build(dict(dataset_cfg, pipeline=[], lazy_init=True))
    report.classes = len(dataset.metainfo.get("classes") or ())
    folders = [Path(dataset.data_prefix[key]) for key in ("img_path", "seg_map_path")]
    if missing := [folder for folder in folders if not folder.is_dir()]:
        report.problems.append(
            f"there is no folder {' and no '.join(map(str, missing))}; docs/segmentation.md says what belongs there; "
            f"--cfg-options {name}_dataloader.dataset.data_root=FOLDER names another place"
        )
        return report
    images, annotations = (
        {path.relative_to(folder).as_posix().removesuffix(suffix): path for path in folder.rglob(f"*{suffix}")}
        for folder, suffix in zip(folders, (dataset.img_suffix, dataset.seg_map_suffix), strict=True)
    )
    report.images, report.annotations = len(images), len(annotations)
    if not images:
        others = sorted({path.suffix for path in folders[0].rglob("*.*")})
        found = f", only {', '.join(others)}" if others else ""
        report.problems.append(f"{folders[0]} holds no image whose name ends with {dataset.img_suffix}{found}")
        return report
    add_names(report, "image without annotation", images.keys() - annotations.keys())
    add_names(report, "annotation without image", annotations.keys() - images.keys())

    pairs = sorted(images.keys() & annotations.keys())
    if sample is not None and sample < len(pairs):
        pairs = [pairs[i] for i in sorted(np.random.default_rng(0).choice(len(pairs), sample, replace=False))]
    report.read = len(pairs)
    classes = len(dataset.label_map or dataset.metainfo["classes"])  # a config may ask for some of those in the files
    # With reduce_zero_label 0 is "other" and the classes count from 1.
    allowed = classes + 1 if dataset.reduce_zero_label else classes
    found: dict[str, list[str]] = {}
    for pair in tqdm(pairs, desc=name, unit="pair", disable=not progress, dynamic_ncols=True):
        if problem := check_pair(images[pair], annotations[pair], allowed, report.pixels):
            found.setdefault(problem, []).append(pair)
    for problem, names in found.items():
        add_names(report, problem, names)
    return report


def check_pair(image_path: Path, annotation_path: Path, allowed: int, pixels: np.ndarray) -> str | None:
    """What is wrong with an image and its annotation, or None; counts the labels into `pixels`."""
    try:
        with Image.open(image_path) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return "image that cannot be read (download or copy it again)"
    try:
        with Image.open(annotation_path) as annotation:
            labels = np.asarray(annotation)
    except (OSError, ValueError, SyntaxError):
        return "annotation that cannot be read (download or copy it again)"
    if labels.ndim != 2 or labels.dtype != np.uint8:
        return "annotation that is not one channel of 8 bits (one label a pixel is asked for, no colours)"
    if labels.shape != (image.height, image.width):
        return "annotation of another size than its image"
    counts = np.bincount(labels.reshape(-1), minlength=256)
    pixels += counts
    if (beyond := np.flatnonzero(counts[allowed:IGNORED])).size:
        return f"annotation with a label beyond {allowed - 1}, such as {allowed + beyond[0]} (another label set?)"
    return None


def add_names(report: Report, problem: str, names: Iterable[str]) -> None:
    """Add a problem that files have, some of them by name; nothing if there are none."""
    if names := sorted(names):
        dots = ", ..." if len(names) > SHOWN else ""
        report.problems.append(f"{len(names)} x {problem}: {', '.join(names[:SHOWN])}{dots}")


def describe(report: Report) -> str:
    """The report in some lines."""
    lines = [f"{report.name}: {report.images} images, {report.annotations} annotations, {report.read} pairs read"]
    if total := report.pixels.sum():
        labels = np.flatnonzero(report.pixels[:IGNORED])
        ignored = report.pixels[IGNORED] / total
        lines.append(f"  {len(labels)} labels occur, {labels[0]} to {labels[-1]}; {ignored:.1%} of pixels are 255")
    lines += [f"  WRONG: {problem}" for problem in report.problems]
    return "\n".join(lines)


@ending()
def main(argv: list[str] | None = None) -> int:
    """Check the training and the validation set of a config; 1 if something is wrong."""
    from tools.mmseg_runs import read_config

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?", type=Path, default=DEFAULT, help="default: ADE20K")
    parser.add_argument("--data-root", help="folder of the data set (the config's)")
    parser.add_argument("--sample", type=int, help="pairs to read of each split (all)")
    args = parser.parse_args(argv)
    cfg = read_config(args.config)
    reports = []
    for split in ("train", "val"):
        dataset_cfg = cfg[f"{split}_dataloader"].dataset
        if args.data_root:
            dataset_cfg.data_root = args.data_root
        reports.append(check_split(dataset_cfg, split, args.sample, progress=True))
        print(describe(reports[-1]))
    wrong = any(report.problems for report in reports)
    print("something is wrong, see above" if wrong else "all well")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
