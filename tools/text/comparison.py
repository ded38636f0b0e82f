"""Rows of a comparison: each a training of `tools/train_text.py` that goes on where it stopped."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from benchmarks.records import ROOT, origin, read_rows, write_rows

from ..ending import InputError
from ..training.recipe import to_yaml
from .engine import SHARES
from .folder import RESULT
from .recipe import LONG_RANGE, TextRecipe, text_model

TOLERANCE = 0.03  # parameters of the rows of a comparison agree within this share
ATTENTIONS = (("fma", 4), ("full", 0), ("local", 0), ("fma", 1), ("mean", 4))
CELLS, RANKS = (4, 8, 16, 32), (1, 2, 4, 8)
SUBJECT = ("name", "attention", "cell_size", "rank", "params")
SAME = ("updates", "batch_size", "context", "dim", "depth", "lr", "text")  # of rows that other seeds are beside
TRAINED = ("updates", "batch_size", "context", "dim", "depth", "mlp_ratio", "lr", "seed")
SCORES = ("bits", "bits_second_half", "bits_by_place", "tokens")
COST = ("processor_ms", "step_ms", "peak_mib")
ORIGIN = ("machine", "threads", "torch", "fma2d", "text", "timestamp", "commit", "command")
CURVE = ("updates", "train_loss", "bits", "bits_second_half")
CURVE_COLUMNS = ("name", "seed", *CURVE)
COLUMNS = SUBJECT + TRAINED + SCORES + COST + ORIGIN


@dataclass(frozen=True)
class Row:
    """A training of a comparison, and its folder."""

    name: str
    recipe: TextRecipe
    folder: Path

    @property
    def is_finished(self) -> bool:
        stored = self.folder / "recipe.yaml"
        return (self.folder / RESULT).exists() and stored.read_text() == to_yaml(self.recipe)

    @property
    def result(self) -> dict:
        return json.loads((self.folder / RESULT).read_text())

    @property
    def log(self) -> list[dict]:
        with (self.folder / "log.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    @property
    def curve(self) -> list[dict]:
        """The validations."""
        subject = dict(name=self.name, seed=str(self.recipe.seed))
        return [subject | {key: line[key] for key in CURVE} for line in self.log]


def table_rows(base: TextRecipe, folder: Path) -> list[Row]:
    """A row for each attention and rank, the MLPs of the others widened to the parameters of the largest.

    Raises:
        InputError: if that leaves more than `TOLERANCE` between any two.
    """
    recipes = [dataclasses.replace(base, attention=name, rank=rank or base.rank) for name, rank in ATTENTIONS]
    most = max(count_parameters(recipe) for recipe in recipes)
    matched = [with_parameters(recipe, most) for recipe in recipes]
    check_parameters(matched)
    rows = []
    for (attention, rank), recipe in zip(ATTENTIONS, matched, strict=True):
        name = f"{attention}, rank {rank}" if rank else attention
        rows.append(Row(name, recipe, folder / name.replace(", rank ", "-rank")))
    return rows


def width_rows(base: TextRecipe, folder: Path) -> list[Row]:
    """The rows of the table with MLPs as wide as its widest, so with parameters that differ by those of the kernels."""
    rows = table_rows(base, folder)
    widest = max(row.recipe.mlp_ratio for row in rows)
    return [dataclasses.replace(row, recipe=dataclasses.replace(row.recipe, mlp_ratio=widest)) for row in rows]


def sweep_rows(base: TextRecipe, folder: Path, cells=CELLS, ranks=RANKS) -> list[Row]:
    """A row for each cell size and each rank that divides it."""
    return [
        Row(
            f"cell {cell}, rank {rank}",
            dataclasses.replace(base, attention="fma", cell_size=cell, rank=rank),
            folder / f"cell{cell}-rank{rank}",
        )
        for cell in cells
        for rank in ranks
        if cell % rank == 0
    ]


def count_parameters(recipe: TextRecipe) -> int:
    """Of the recipe's model, which is not made for it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in text_model(recipe).parameters())


def with_parameters(recipe: TextRecipe, count: int) -> TextRecipe:
    """The recipe with the MLP whose width brings the model nearest to `count` parameters."""
    hidden = round(recipe.dim * recipe.mlp_ratio)
    each = recipe.depth * (2 * recipe.dim + 1)  # parameters of one channel more inside every MLP
    hidden += round((count - count_parameters(recipe)) / each)
    return dataclasses.replace(recipe, mlp_ratio=(hidden + 0.5) / recipe.dim)  # the model rounds down


def check_parameters(recipes: list[TextRecipe]) -> None:
    """Raise InputError if the models are not of one size."""
    counts = [count_parameters(recipe) for recipe in recipes]
    if max(counts) > (1 + TOLERANCE) * min(counts):
        raise InputError(
            f"the models have {min(counts)} to {max(counts)} parameters; a comparison allows {TOLERANCE:.0%} in between"
        )


def train(rows: list[Row], data: Path | None, device: str, workers: int, threads: int) -> list[str]:
    """Train what is not finished, `workers` at a time; the names of those that failed."""
    missing = [row for row in rows if not row.is_finished]
    if len(missing) < len(rows):
        print(f"finished before: {len(rows) - len(missing)} of {len(rows)} rows")
    with ThreadPoolExecutor(workers) as pool:
        codes = list(pool.map(lambda row: _train(row, data, device, threads), missing))
    return [row.name for row, code in zip(missing, codes, strict=True) if code]


def _train(row: Row, data: Path | None, device: str, threads: int) -> int:
    row.folder.parent.mkdir(parents=True, exist_ok=True)
    recipe = row.folder.with_name(row.folder.name + ".yaml")
    recipe.write_text(to_yaml(row.recipe))
    words = [str(ROOT / "tools" / "train_text.py"), str(recipe), "--output", str(row.folder), "--resume"]
    words += ["--device", device, "--no-tensorboard", "--progress", "30"]
    words += ["--data", str(data)] if data else []
    child = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with child:
        for line in child.stdout:
            print(f"[{row.name}] {line}", end="", flush=True)
    return child.returncode


def places(context: int) -> list[str]:
    """The names of the parts of a window, `0-63` and so on."""
    ends = [0, *(round(share * context) for share in SHARES)]
    return [f"{start}-{stop - 1}" for start, stop in pairwise(ends)]


@dataclass(frozen=True)
class Recorded:
    """Rows and learning curves of CSV files, of any seeds."""

    rows: list[dict]
    points: list[dict]

    @classmethod
    def read(cls, path: Path, curves: Path) -> "Recorded":
        """What the files hold."""
        return cls(read_rows(path, COLUMNS), read_rows(curves, CURVE_COLUMNS))

    def with_seed(self, rows: list[dict], points: list[dict]) -> "Recorded":
        """These of one seed, after what is recorded of the same trainings with other seeds."""
        new = rows[0]
        kept = [row for row in self.rows if row["seed"] != new["seed"] and all(row[key] == new[key] for key in SAME)]
        if gone := len([row for row in self.rows if row["seed"] != new["seed"]]) - len(kept):
            print(f"{gone} recorded rows of other trainings (another {', '.join(SAME)}) are replaced")
        seeds = {row["seed"] for row in kept}
        return Recorded(kept + rows, [point for point in self.points if point["seed"] in seeds] + points)

    def write(self, path: Path, curves: Path) -> None:
        """Both files, anew."""
        write_rows(path, COLUMNS, self.rows)
        write_rows(curves, CURVE_COLUMNS, self.points)


def csv_row(row: Row, step_ms: str, peak_mib: str, device: str, threads: int) -> dict:
    """A finished row as columns; `step_ms` and `peak_mib` of a training step, measured apart."""
    recipe, result, log = row.recipe, row.result, row.log
    by_place = zip(places(recipe.context), result["bits_by_place"], strict=True)
    facts = dataclasses.asdict(recipe) | dict(
        name=row.name,
        cell_size="" if recipe.attention == "full" else recipe.cell_size,
        rank=recipe.rank if recipe.attention in LONG_RANGE else "",
        params=result["params"],
        updates=result["updates"],
        mlp_ratio=f"{recipe.mlp_ratio:.4g}",
        bits=f"{result['bits']:.4f}",
        bits_second_half=f"{result['bits_second_half']:.4f}",
        bits_by_place=" ".join(f"{name}:{bits:.4f}" for name, bits in by_place),
        tokens=result["tokens"],
        processor_ms=f"{1000 * sum(float(line['processor_seconds']) for line in log) / result['updates']:.4g}",
        step_ms=step_ms,
        peak_mib=peak_mib,
        text=result["text"],
        **origin(device, threads),
    )
    return {name: str(facts[name]) for name in COLUMNS}
