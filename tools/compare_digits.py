"""Trains the recipes of configs/digits with several seeds and records the accuracy after the last epoch.

Each run is a process of tools/train_classifier.py; its row is appended to the results file when it ends, and runs that
the file holds are not made again. The figure is that of the last epoch, not of the best one, which would choose by the
images that it is measured on.
"""

import argparse
import csv
import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import text_table
from benchmarks.records import ROOT, append_rows, children_seconds, origin, read_rows
from tools.ending import ending
from tools.training.model import recipe_model
from tools.training.recipe import make_recipe, read_values

RESULT = ("top1", "val_loss", "seconds", "cpu_seconds")
COLUMNS = (
    *("recipe", "attention", "params", "epochs", "images", "seed", *RESULT),
    *("machine", "threads", "torch", "timm", "timestamp", "commit", "command"),
)


@ending(interrupted="interrupted; finished runs are kept")
def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the table; 1 if a run fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipes", nargs="+", default=["fma2d_nano", "mit_b0", "dense"], help="of configs/digits (all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    add("--data-dir", type=Path, default=ROOT / "data" / "digits", help="see tools/make_digits.py (data/digits)")
    add("--output", type=Path, default=ROOT / "out" / "digits", help="folder for the runs' folders (out/digits)")
    add("--results", type=Path, default=ROOT / "benchmarks" / "results" / "digits.csv", help="file to append to")
    args = parser.parse_args(argv)
    rows = read_rows(args.results, COLUMNS)
    done = {(row["recipe"], int(row["seed"])) for row in rows}
    for seed in args.seeds:
        for name in args.recipes:
            if (name, seed) not in done:
                row = train(name, seed, args.data_dir, args.output / f"{name}-{seed}")
                if row is None:
                    return 1
                rows.append(row)
                append_rows(args.results, COLUMNS, [row])
    print(table(rows))
    return 0


def train(name: str, seed: int, data_dir: Path, output: Path) -> dict | None:
    """One run; None if it fails, as it does where an earlier one left its folder."""
    words = ["tools/train_classifier.py", f"configs/digits/{name}.yaml", "--seed", str(seed), "--workers", "0"]
    places = ["--data-dir", str(data_dir), "--output", str(output)]
    print(f"\n{name}, seed {seed}", flush=True)
    start, cpu_start = time.monotonic(), children_seconds()
    if subprocess.run([sys.executable, *words, *places], cwd=ROOT).returncode:
        return None
    seconds, cpu_seconds = time.monotonic() - start, children_seconds() - cpu_start
    with (output / "log.csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    recipe = make_recipe(read_values(ROOT / "configs" / "digits" / f"{name}.yaml"), name)
    model = recipe_model(dataclasses.replace(recipe, seed=seed), recipe.num_classes)
    row = origin() | dict(
        recipe=name,
        attention=recipe.attention,
        params=sum(parameter.numel() for parameter in model.parameters()),
        epochs=len(log),
        images=sum(1 for _ in data_dir.glob("train/*/*")),
        seed=seed,
        top1=f"{float(log[-1]['top1']):.2f}",
        val_loss=f"{float(log[-1]['val_loss']):.4f}",
        seconds=f"{seconds:.0f}",
        cpu_seconds=f"{cpu_seconds:.0f}",
        command=" ".join(words),
    )
    return {name: str(row[name]) for name in COLUMNS}


def table(rows: list[dict]) -> str:
    """A line for each recipe: each seed's top-1, their mean, and the mean processor time of a run."""
    header = ["recipe", "attention", "parameters", "top-1 of each seed", "mean", "CPU seconds a run"]
    lines = []
    for name in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == name]
        scores = [float(row["top1"]) for row in own]
        line = [name, own[0]["attention"], f"{int(own[0]['params']) / 1e6:.2f} M", " ".join(row["top1"] for row in own)]
        lines.append([*line, f"{mean(scores):.2f}", f"{mean(float(row['cpu_seconds']) for row in own):.0f}"])
    return text_table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
