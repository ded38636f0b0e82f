"""Measures how close Fast Multipole Attention comes to the full attention that a model was trained with.

The model is the one with full attention of a run of research.compare_attention. FMA takes over its projections; what is
measured is the relative error of the attention's output (before its last projection) on features of the model over
the test set, and the accuracy of the model with its attention swapped. Each with kernels at their start value, the mean
over sub-cells, and after a fine-tuning of the kernels alone that lessens the error on training features.

    python -m research.compare_attention --tasks look_afar --variants full --seeds 0 --results out/quality
    python -m research.approximation

(`--results`: with the recorded ones, which hold this run already, it would not be made again.)
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import trange

from benchmarks.records import ROOT, origin, write_rows
from fma2d import FMA2d, num_levels
from fma2d.baselines import DenseAttention
from tools.ending import InputError, ending

from . import FIGURES, RESULTS
from .quality import report, runs
from .quality.model import VARIANTS
from .quality.tasks import TASKS, Task

SETTING = ("task", "variant", "cell_size", "rank", "kernels", "level")
COLUMNS = (*SETTING, "error", "score", "full_score", "tune_steps", *runs.ORIGIN)
ALL = "all"  # levels together; earlier rows also have one level at a time
KERNELS = ("start", "tuned")
LEARNING_RATE = 0.02


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--state", type=Path, help="state.pt of a finished run with full attention (look_afar's, seed 0)")
    add("--cell-size", type=int, help="in all stages (that of the run's task in its first stage)")
    add("--rank", type=int, nargs="+", default=[1, 2, 4], help="summary tokens a coarse cell (1 2 4)")
    add("--variants", nargs="+", choices=("linear", "loglinear"), default=["linear", "loglinear"], help="(both)")
    add("--steps", type=int, default=200, help="of fine-tuning the kernels (200)")
    add("--out", type=Path, default=RESULTS / "quality_approximation.csv", help="results file")
    add("--figure", type=Path, default=FIGURES / "quality_approximation.png", help="PNG")
    args = parser.parse_args(argv)
    if args.state is None:
        run = runs.make_run(TASKS["look_afar"], "full", 0)
        args.state = ROOT / "out" / "quality" / run.folder / "state.pt"
    if args.steps < 1:
        parser.error("--steps must be at least 1")
    return args


def full_attention(model: nn.Module) -> list[str]:
    """Names of the model's attention layers, in order."""
    return [name for name, module in model.named_modules() if isinstance(module, DenseAttention)]


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the model's attention layers see: `[B, H, W, dim]` each."""
    seen = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        for name in full_attention(model)
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return seen


def stand_in(attention: DenseAttention, grid: Sequence[int], cell_size: int, rank: int, variant: str) -> FMA2d:
    """FMA with the projections of a full attention, its kernels at their start value."""
    levels = num_levels(tuple(grid), cell_size)
    layer = FMA2d(attention.proj.in_features, attention.num_heads, cell_size, rank, levels=levels, variant=variant)
    layer.qkv, layer.proj = attention.qkv, attention.proj
    return layer


def attended(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of an attention layer before its last projection."""
    dim = x.shape[-1]
    return functional_call(layer, {"proj.weight": torch.eye(dim), "proj.bias": torch.zeros(dim)}, x)


def squares(layer: FMA2d, attention: DenseAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of the error and of full attention's output."""
    with torch.no_grad():
        truth = attended(attention, x)
    return (attended(layer, x) - truth).square().sum(), truth.square().sum()


@torch.no_grad()
def error(layers: Sequence[FMA2d], model: nn.Module, seen: Sequence[Tensor]) -> float:
    """The relative error, averaged over the layers that have a coarse level."""
    shares = []
    for layer, name, x in zip(layers, full_attention(model), seen, strict=True):
        if layer.levels:
            pairs = [torch.stack(squares(layer, model.get_submodule(name), part)) for part in x.split(50)]
            wrong, whole = sum(pairs)
            shares.append((wrong / whole).sqrt().item())
    return sum(shares) / len(shares)


def tune(layers: Sequence[FMA2d], model: nn.Module, task: Task, seed: int, steps: int, shown: str) -> None:
    """Lessen the error of all levels on features of training images, by the kernels alone."""
    kernels = [layer.kernels for layer in layers if layer.kernels is not None]
    optimizer = torch.optim.Adam(kernels, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in trange(steps, desc=shown, unit="step", dynamic_ncols=True, mininterval=5):
        images, _ = task.draw(np.random.default_rng((seed, step)), task.batch_size)
        full = map(model.get_submodule, full_attention(model))
        parts = [squares(*trio) for trio in zip(layers, full, features(model, images), strict=True)]
        optimizer.zero_grad()
        grads = torch.autograd.grad(sum(wrong / whole for wrong, whole in parts), kernels)
        for kernel, grad in zip(kernels, grads, strict=True):
            kernel.grad = grad
        optimizer.step()
        schedule.step()


def swapped(model: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """A copy of the model with these attention layers."""
    model = copy.deepcopy(model)
    for name, layer in zip(full_attention(model), layers, strict=True):
        model.set_submodule(name, layer)
    return model


def measure(model: nn.Module, run: runs.Run, cell_size: int, ranks: Sequence[int], variants: Sequence[str], steps: int):
    """The rows of a model: settings, error, score."""
    task = TASKS[run.task]
    seen = features(model, runs.test_set(task)[0])
    if not any(num_levels(tuple(x.shape[1:3]), cell_size) for x in seen):
        raise InputError(f"{run.task} has no coarse level in cells of {cell_size}: FMA is full attention there")
    full_score = runs.evaluate(model, task)["score"]
    for variant in variants:
        for rank in ranks:
            names = zip(full_attention(model), seen, strict=True)
            layers = [stand_in(model.get_submodule(n), x.shape[1:3], cell_size, rank, variant) for n, x in names]
            for kernels in KERNELS:
                if kernels == "tuned":
                    tune(layers, model, task, run.seed, steps, f"{variant}, rank {rank}")
                score = runs.evaluate(swapped(model, layers), task)["score"]
                setting = dict(task=run.task, variant=variant, cell_size=cell_size, rank=rank, kernels=kernels)
                setting |= dict(score=score, full_score=full_score, tune_steps=steps if kernels == "tuned" else 0)
                yield setting | dict(level=ALL, error=error(layers, model, seen))


def table(rows: Sequence[dict]) -> report.Table:
    """A line for each variant and rank, start value and tuned."""
    header = ["variant", "rank", "kernels", "error", "score after the swap, %", "full attention, %"]
    lines = []
    for row in rows:
        if row["level"] == ALL:
            numbers = (f"{float(row[name]):.1f}" for name in ("score", "full_score"))
            lines.append([VARIANTS[row["variant"]], row["rank"], row["kernels"], f"{100 * float(row['error']):.1f} %"])
            lines[-1] += numbers
    return header, lines


def draw(rows: Sequence[dict]) -> Figure:
    """Error, and score after the swap, by rank; start value dashed, tuned solid."""
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    errors, scores = figure.subplots(1, 2)
    rows = [row for row in rows if row["level"] == ALL]
    for i, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        for kernels, style in zip(KERNELS, ("--", "-"), strict=True):
            own = [row for row in rows if (row["variant"], row["kernels"]) == (variant, kernels)]
            look = dict(linestyle=style, marker="os"[i], color=f"C{i}", label=f"{VARIANTS[variant]}, {kernels}")
            errors.plot([row["rank"] for row in own], [100 * float(row["error"]) for row in own], **look)
            scores.plot([row["rank"] for row in own], [float(row["score"]) for row in own], **look)
    scores.axhline(float(rows[0]["full_score"]), color="0.4", linewidth=1)
    for axes, name in ((errors, "relative error of the output, %"), (scores, "score after the swap, %")):
        axes.set_xlabel("rank (summary tokens a coarse cell)")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.legend(*errors.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    where = f"{rows[0]['task']}, cell size {rows[0]['cell_size']}; grey: full attention"
    figure.supxlabel(where, fontsize=8, color="0.35")
    return figure


@ending(ValueError)
def main(argv: list[str] | None = None) -> None:
    """Measure, write, draw."""
    args = parse(argv)
    if not args.state.exists():
        train = "-m research.compare_attention --tasks look_afar --variants full --seeds 0 --results out/quality"
        raise InputError(f"there is no {args.state}; python {train} trains such a model")
    model, run = runs.trained_model(args.state)
    if run.variant != "full":
        raise InputError(f"{args.state} is of a run with {VARIANTS[run.variant]}, not with full attention")
    facts = origin()
    found = measure(model, run, args.cell_size or run.cells[0], args.rank, args.variants, args.steps)
    rows = [runs.as_row(row | facts, COLUMNS) for row in found]
    write_rows(args.out, COLUMNS, rows)
    print(f"\n{report.plain(table(rows))}\n\n{args.out}\n{report.save(draw(rows), args.figure)}")


if __name__ == "__main__":
    sys.exit(main())
