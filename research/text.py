"""Compares attention in text models on novels: bits per byte, at equal parameters, against updates and against seconds.

    python research/novels.py novels_100.tar.xz        # first: writes data/novels
    python research/text.py contexts --until 20        # fma, rank 4 and 1, mean, full, local at contexts 512 to 8192
    python research/text.py cells --until 20           # fma: cells of 16 and 64
    python research/text.py masked --until 20          # masked modelling at 2048: fma, fma-linear, full
    python research/text.py authors --until 20         # who wrote a passage of 4096 characters: fma, full, local
    python research/text.py report                     # tables and figures of what is recorded

Every row is a training of tools/train_text.py, of --until minutes. Its learning rate is constant and a moving average
of its weights is judged, so that its curve may be read at any time, and a later call with a larger --until goes on with
what is there. --budget ends a call after so many minutes, and the same command goes on, also after a kill. Rows go to
research/results, figures to docs/figures.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.harness import text_table
from benchmarks.records import ROOT, latest, origin, read_rows, write_rows
from fma2d.text import load_model
from tools.ending import GOES_ON, InputError, ending
from tools.text.batches import make_batches
from tools.text.corpus import read_corpus
from tools.text.engine import evaluate
from tools.text.recipe import TextRecipe, text_model
from tools.training.engine import Processes
from tools.training.recipe import make_recipe, read_values, to_yaml

CONTEXTS = (512, 2048, 4096, 8192)
MAIN = (("fma", 4, 32), ("full", 4, 32), ("local", 4, 32), ("fma", 1, 32), ("mean", 4, 32))
CELLS = [("fma", rank, cell) for cell in (16, 64) for rank in (4, 1)]
FAR = ("fma", "fma-linear", "mean")
UPDATE = 8192  # tokens
VALIDATION = 65536  # tokens, at most
TOLERANCE = 0.01  # parameters of all rows of a study agree within this share
SUBJECT = ("study", "name", "context", "seed")
MODEL = ("attention", "rank", "cell_size", "params", "kernels", "dim", "depth", "mlp_ratio", "lr", "batch_size")
SCORES = ("updates", "seconds", "processor_seconds", "bits", "accuracy", "bits_by_place", "count", "text")
ORIGIN = ("machine", "device", "threads", "torch", "python", "fma2d", "commit", "command", "timestamp")
COLUMNS = (*SUBJECT, *MODEL, *SCORES, *ORIGIN)
CURVE = (*SUBJECT, "updates", "seconds", "processor_seconds", "train_loss", "bits", "accuracy")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=(*STUDIES, "report"), help="what to train, or report")
    add(
        "--data", type=Path, default=ROOT / "data" / "novels", metavar="DIR", help="of research/novels.py (data/novels)"
    )
    add("--recipe", type=Path, default=ROOT / "configs" / "text" / "novels.yaml", help="(configs/text/novels.yaml)")
    add("--until", type=float, default=20, metavar="MINUTES", help="of training for each row (20)")
    add("--budget", type=float, metavar="MINUTES", help="for this call, data and scores included (no limit)")
    add("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="N", help="of contexts and cells (all four)")
    add("--seeds", type=int, nargs="+", default=[0, 1], metavar="N", help="of all studies; cells has the first (0 1)")
    add(
        "--updates-per-epoch",
        type=int,
        metavar="N",
        help="updates from one point of a curve to the next (the recipe's)",
    )
    add("--test-tokens", type=int, default=1 << 18, metavar="N", help="of the test split, evenly spread (262144)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--threads", type=int, default=1, help="of a training (1)")
    add("--output", type=Path, default=ROOT / "out" / "text_study", metavar="DIR", help="for the runs (out/text_study)")
    add("--results", type=Path, default=ROOT / "research" / "results", metavar="DIR", help="(research/results)")
    add("--figures", type=Path, default=ROOT / "docs" / "figures", metavar="DIR", help="(docs/figures)")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Row:
    """A training of a study, and its folder."""

    study: str
    name: str
    recipe: TextRecipe
    folder: Path

    @property
    def subject(self) -> dict:
        facts = dict(study=self.study, name=self.name, context=self.recipe.context, seed=self.recipe.seed)
        return {key: str(value) for key, value in facts.items()}

    def curve(self) -> list[dict]:
        """The rows of its log, with updates and seconds since the start."""
        path = self.folder / "log.csv"
        if not path.exists():
            return []
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        for key in ("seconds", "processor_seconds"):
            total = 0.0
            for line in lines:
                total += float(line[key])
                line[key] = f"{total:.2f}"
        return [self.subject | {key: line[key] for key in CURVE[len(SUBJECT) :]} for line in lines]

    def minutes(self) -> float:
        """Of training so far."""
        curve = self.curve()
        return float(curve[-1]["seconds"]) / 60 if curve else 0.0


def make_row(args, base: TextRecipe, study: str, kind: tuple, context: int, seed: int, **keys) -> Row:
    """The row of a kind `(attention, rank, cell size)`, with as many parameters as full attention has."""
    attention, rank, cell = kind
    settings = dict(context=context, batch_size=max(1, UPDATE // context), eval_windows=max(1, VALIDATION // context))
    settings |= dict(seed=seed) | keys
    if base.updates_per_epoch and settings.get("task") != "classify":
        settings |= dict(updates_per_epoch=args.updates_per_epoch or base.updates_per_epoch)
    base = replace(base, **settings)
    recipe = replace(base, attention=attention, rank=rank, cell_size=cell)
    recipe = with_parameters(recipe, count_parameters(replace(recipe, attention="full"))[0])
    name = (
        attention + (f", rank {rank}" if attention in FAR else "") + (f", cell {cell}" if attention != "full" else "")
    )
    return Row(
        study, name, recipe, args.output / f"{study}-{context}-{name.replace(', ', '-').replace(' ', '')}-{seed}"
    )


def contexts(args, base: TextRecipe) -> list[Row]:
    """Seed by seed, so that the first is whole before others begin."""
    return [
        make_row(args, base, "contexts", kind, context, seed)
        for seed in args.seeds
        for context in args.contexts
        for kind in MAIN
    ]


def cells(args, base: TextRecipe) -> list[Row]:
    """What is not among the rows of `contexts`; of one seed."""
    return [make_row(args, base, "cells", kind, context, args.seeds[0]) for context in args.contexts for kind in CELLS]


def masked(args, base: TextRecipe) -> list[Row]:
    """Bidirectional models."""
    kinds = [(name, 4, 32) for name in ("fma", "fma-linear", "full")]
    return [make_row(args, base, "masked", kind, 2048, seed, task="masked") for seed in args.seeds for kind in kinds]


def authors(args, base: TextRecipe) -> list[Row]:
    """Classification, by smaller models; an epoch is a pass of the passages."""
    keys = dict(task="classify", source="csv", updates_per_epoch=None, eval_windows=None)
    keys |= dict(dim=96, depth=2, num_heads=3, lr=1e-3, min_lr=1e-3)
    kinds = (("fma", 1, 32), ("full", 1, 32), ("local", 1, 32))
    return [make_row(args, base, "authors", kind, 4096, seed, **keys) for seed in args.seeds for kind in kinds]


STUDIES = dict(contexts=contexts, cells=cells, masked=masked, authors=authors)


def count_parameters(recipe: TextRecipe) -> tuple[int, int]:
    """Of the recipe's model, which is not made for it: all, and those that are aggregation kernels."""
    with torch.device("meta"):
        found = [(name, p.numel()) for name, p in text_model(recipe, 33).named_parameters()]
    return sum(n for _, n in found), sum(n for name, n in found if name.endswith(".kernels"))


def with_parameters(recipe: TextRecipe, count: int) -> TextRecipe:
    """The recipe with the MLPs whose width brings the model nearest to `count` parameters; InputError if none does."""
    hidden = round(recipe.dim * recipe.mlp_ratio)
    hidden += round((count - count_parameters(recipe)[0]) / (recipe.depth * (2 * recipe.dim + 1)))
    if hidden > 0:
        recipe = replace(recipe, mlp_ratio=(hidden + 0.5) / recipe.dim)  # the model rounds down
    found = count_parameters(recipe)[0]
    if abs(found - count) > TOLERANCE * count:
        raise InputError(f"{recipe.attention} has {found} parameters, not {count}; {TOLERANCE:.0%} is allowed")
    return recipe


@ending(interrupted=GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Train, or report; 1 if a training fails."""
    args, start = parse(argv), time.monotonic()
    if args.study == "report":
        report(args)
        return 0
    base = make_recipe(read_values(args.recipe, TextRecipe), str(args.recipe), TextRecipe)
    rows, failed = STUDIES[args.study](args, base), []
    torch.set_num_threads(args.threads)
    for row in rows:
        left = float("inf") if args.budget is None else args.budget - (time.monotonic() - start) / 60
        if left <= 0:
            print(f"the budget of {args.budget:g} minutes is used; the same command goes on")
            break
        if (before := row.minutes()) < args.until:
            stop = min(args.until, before + left)
            print(
                f"{row.name}, context {row.recipe.context}, seed {row.recipe.seed}: {before:.1f} to {stop:.1f} min",
                flush=True,
            )
            if train(row, args, stop):
                failed.append(row.name)
                continue
        record(row, args)
    done = sum(row.minutes() >= args.until for row in rows)
    print(f"{done} of {len(rows)} rows have {args.until:g} minutes; rows in {args.results / 'text.csv'}")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def data_of(row: Row, args) -> Path:
    return args.data / "authors" if row.recipe.task == "classify" else args.data


def train(row: Row, args, stop: float) -> int:
    """Bring a row to `stop` minutes of training; the trainer's status."""
    row.folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = row.folder.with_name(row.folder.name + ".yaml")
    recipe.write_text(to_yaml(row.recipe))
    words = [
        sys.executable,
        ROOT / "tools" / "train_text.py",
        recipe,
        "--data",
        data_of(row, args),
        "--output",
        row.folder,
    ]
    words += ["--resume", "--stop-after", stop, "--device", args.device, "--no-tensorboard", "--progress", 60]
    return subprocess.call([*map(str, words)], env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})


def record(row: Row, args) -> None:
    """Score a row on the test split, and write it with its curve, unless that was done after its last update."""
    paths = [args.results / name for name in ("text.csv", "text_curves.csv")]
    rows, points = read_rows(paths[0], COLUMNS), read_rows(paths[1], CURVE)
    curve = row.curve()
    if not curve or any({**x, **row.subject, "updates": curve[-1]["updates"]} == x for x in rows):
        return
    recipe = replace(
        row.recipe, eval_windows=None if row.recipe.task == "classify" else args.test_tokens // row.recipe.context
    )
    processes, corpus = Processes(torch.device(args.device)), read_corpus(recipe, data_of(row, args))
    model = load_model(row.folder / "last.safetensors", args.device)
    scores = evaluate(model, make_batches(recipe, corpus, processes, 1)[2], recipe, processes)
    count, kernels = count_parameters(recipe)
    facts = asdict(recipe) | origin(args.device, args.threads) | curve[-1]
    facts |= dict(params=count, kernels=kernels, mlp_ratio=f"{recipe.mlp_ratio:.4g}", device=args.device)
    facts |= dict(count=scores["count"], text=corpus.sha256)
    facts |= {key: f"{scores[key]:.4f}" if key in scores else "" for key in ("bits", "accuracy")}
    places = {place: round(bits, 4) for place, bits in scores.get("bits_by_place", {}).items()}
    facts |= dict(bits_by_place=json.dumps(places) if places else "")
    new = {key: str(facts[key]) for key in COLUMNS}
    write_rows(paths[0], COLUMNS, latest([*rows, new], SUBJECT))
    others = [point for point in points if any(point[key] != new[key] for key in SUBJECT)]
    write_rows(paths[1], CURVE, [*others, *curve])
    print(
        f"{row.name}: " + (f"{facts['accuracy']} % right" if facts["accuracy"] else f"{facts['bits']} bits a byte"),
        flush=True,
    )


def report(args) -> None:
    """Tables and figures of each study and context."""
    rows = read_rows(args.results / "text.csv", COLUMNS)
    points = read_rows(args.results / "text_curves.csv", CURVE)
    if not rows:
        raise InputError(f"there is no row in {args.results / 'text.csv'}")
    for study in dict.fromkeys(row["study"] for row in rows):
        found = [row for row in rows if row["study"] == study]
        print(f"\n{study}: {found[0]['machine']}, {found[0]['threads']} thread(s), torch {found[0]['torch']}\n")
        header = [
            "context",
            "attention",
            "seed",
            "parameters",
            "kernels",
            "updates",
            "minutes",
            "test",
            "bits by place",
        ]
        print(text_table(header, [table_row(row) for row in sorted(found, key=lambda row: int(row["context"]))]))
        path = args.figures / f"text_{study}.png"
        draw(found, [point for point in points if point["study"] == study], path)
        print(f"\n{path}")


def table_row(row: dict) -> list[str]:
    """A row for the eye."""
    score = f"{row['accuracy']} %" if row["accuracy"] else row["bits"]
    places = json.loads(row["bits_by_place"] or "{}")
    minutes = f"{float(row['seconds']) / 60:.1f}"
    shown = " ".join(f"{place}:{bits:.3f}" for place, bits in places.items())
    return [*(row[key] for key in ("context", "name", "seed", "params", "kernels", "updates")), minutes, score, shown]


def draw(rows: list[dict], points: list[dict], path: Path) -> None:
    """A column a context: validation against updates, against seconds, and test bits by position; means over seeds."""
    from matplotlib.figure import Figure

    sizes = sorted({int(row["context"]) for row in rows})
    names = list(dict.fromkeys(row["name"] for row in rows))
    score = "accuracy" if rows[0]["accuracy"] else "bits"
    panels = ["updates", "seconds"] + (["place"] if score == "bits" else [])
    figure = Figure(figsize=(4.5 * len(sizes), 3.6 * len(panels) + 0.8), layout="constrained")
    grid = figure.subplots(len(panels), len(sizes), squeeze=False)
    for column, context in zip(grid.T, sizes, strict=True):
        for i, name in enumerate(names):
            own = [
                point for point in points if (point["name"], point["context"]) == (name, str(context)) and point[score]
            ]
            for axes, key in zip(column, panels[:2], strict=False):
                seeds = defaultdict(list)
                for point in own:
                    seeds[point["seed"]].append((float(point[key]), float(point[score])))
                curves = zip(*seeds.values(), strict=False)  # of the points that all seeds have
                line = [tuple(mean(values) for values in zip(*pairs, strict=True)) for pairs in curves]
                axes.plot(*zip(*line, strict=True), color=f"C{i}", label=name) if line else None
            tests = [
                json.loads(row["bits_by_place"])
                for row in rows
                if (row["name"], row["context"]) == (name, str(context)) and row["bits_by_place"]
            ]
            if tests:
                places = list(tests[0])
                column[2].plot(
                    places, [mean(test[place] for test in tests) for place in places], "o-", color=f"C{i}", label=name
                )
                column[2].tick_params(axis="x", rotation=60)
        column[0].set_title(f"context {context}")
        for axes, key in zip(column, panels, strict=True):
            axes.set(
                xlabel="position in the window" if key == "place" else key,
                ylabel=score if key != "place" else "test bits",
            )
            axes.set_xscale("linear" if key == "place" else "log")
            axes.grid(alpha=0.3)
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles) or 1, frameon=False)
    first = rows[0]
    versions = f"torch {first['torch']}, fma2d {first['fma2d']} {first['commit']}"
    figure.supxlabel(f"{first['machine']}, {first['threads']} thread(s); {versions}", fontsize=8, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
