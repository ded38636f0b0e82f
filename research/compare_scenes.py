"""Trains the configs of configs/scenes, one after the other, and records their mIoU on the generated scenes.

Each run is a process of tools/train.py; its row is appended to the results file when it ends, and runs that the file
holds are not made again. The figures are those of the last iteration, not of the best one, which would choose by the
scenes that it is measured on.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

from mmengine.registry import MODELS

from benchmarks.harness import text_table
from benchmarks.records import ROOT, children_seconds, origin, read_rows
from tools.ending import ending
from tools.make_scenes import LABELS, LONG_RANGE
from tools.mmseg_runs import read_config, replace_sync_bn

from .trials import RESULTS, make_missing

CONFIGS = sorted((ROOT / "configs" / "scenes").glob("*.py"))
NAMES = [name for name, label in LABELS.items() if label]
COLUMNS = (
    *("config", "params", "iterations", "batch", "mIoU", "long_range", "others", *NAMES, "seconds", "cpu_seconds"),
    *("machine", "threads", "torch", "mmseg", "timestamp", "commit", "command"),
)


@ending(interrupted="interrupted; finished runs are kept")
def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table; 1 if a run fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--configs", nargs="+", type=Path, default=CONFIGS, help="to train (all of configs/scenes)")
    add("--data-root", type=Path, default=ROOT / "data" / "scenes", help="see tools/make_scenes.py (data/scenes)")
    add("--output", type=Path, default=ROOT / "work_dirs", help="folder for the runs' folders (work_dirs)")
    add("--results", type=Path, default=RESULTS / "scenes.csv", help="file to append to")
    args = parser.parse_args(argv)

    def make(config: Path, place: str) -> dict | None:
        print(f"\n{place} {config.stem}", flush=True)
        return train(config, args.data_root, args.output / config.stem)

    complete = make_missing(args.configs, args.results, COLUMNS, ["config"], lambda config: (config.stem,), make)
    print(table(read_rows(args.results, COLUMNS)))
    return 0 if complete else 1


def train(config: Path, data_root: Path, folder: Path) -> dict | None:
    """One run; None if it fails."""
    places = [f"{split}_dataloader.dataset.data_root={data_root}" for split in ("train", "val", "test")]
    command = ["tools/train.py", str(config), "--work-dir", str(folder), "--cfg-options", *places]
    start, cpu_start = time.monotonic(), children_seconds()
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        return None
    return make_row(config, folder, time.monotonic() - start, children_seconds() - cpu_start)


def make_row(config: Path, folder: Path, seconds: float, cpu_seconds: float) -> dict:
    """The row of a run that has ended, from its config and its log."""
    cfg = read_config(config)
    replace_sync_bn(cfg.model)
    ious = last_ious(max(folder.glob("*/*.log")).read_text())
    row = origin() | dict(
        config=config.stem,
        params=sum(parameter.numel() for parameter in MODELS.build(cfg.model).parameters()),
        iterations=cfg.train_cfg.max_iters,
        batch=cfg.train_dataloader.batch_size,
        mIoU=f"{mean(ious.values()):.2f}",
        long_range=f"{mean(ious[name] for name in LONG_RANGE):.2f}",
        others=f"{mean(ious[name] for name in NAMES if name not in LONG_RANGE):.2f}",
        **{name: f"{ious[name]:.2f}" for name in NAMES},
        seconds=f"{seconds:.0f}",
        cpu_seconds=f"{cpu_seconds:.0f}",
        command=f"tools/train.py configs/scenes/{config.name}",
    )
    return {name: str(row[name]) for name in COLUMNS}


def last_ious(log: str) -> dict[str, float]:
    """The IoU of each class in the last table of mmsegmentation's log, in percent."""
    lines = log.rsplit("per class results:", 1)[1]
    found = {name: float(iou) for name, iou in re.findall(r"^\| +(\w+) +\| +([\d.]+) +\|", lines, re.MULTILINE)}
    return {name: found[name] for name in NAMES}


def table(rows: list[dict]) -> str:
    """A line for each config."""
    header = ["config", "parameters", "mIoU", "six long-range classes", "nine others", "CPU seconds"]
    columns = ("mIoU", "long_range", "others", "cpu_seconds")
    lines = [[row["config"], f"{int(row['params']) / 1e6:.2f} M", *(row[name] for name in columns)] for row in rows]
    return text_table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
