"""Measures how close Fast Multipole Attention comes to the full attention that a model was trained with.

The model is the one with full attention of a run of tools/compare_attention.py. FMA takes over its projections; what is
measured is the relative error of the attention's output (before its last projection) on features of the model, over
the test set: of all levels together, and of each level alone, the others being attended to token by token. Then the
accuracy of the model with its attention swapped. Each with kernels at their start value, the mean over sub-cells, and
after a fine-tuning of the kernels alone that lessens the error on training features; nothing else is learned.

    python tools/compare_attention.py --tasks look_afar --variants full --seeds 0 --results out/quality
    python tools/approximation.py

(`--results`: with the recorded ones, which hold this run already, it would not be made again.)
"""

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import trange

from benchmarks.records import ROOT, origin, write_rows
from fma2d import num_levels
from fma2d.baselines import DenseAttention
from tools.ending import InputError, ending
from tools.quality import dense, report, runs
from tools.quality.model import VARIANTS
from tools.quality.tasks import TASKS, Task

SETTING = ("task", "variant", "cell_size", "rank", "kernels", "level")
COLUMNS = (*SETTING, "error", "score", "full_score", "tune_steps", *runs.ORIGIN)
ALL = "all"  # levels together
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
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality_approximation.csv", help="results file")
    add("--figure", type=Path, default=ROOT / "docs" / "figures" / "quality_approximation.png", help="PNG")
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


def stand_in(attention: DenseAttention, grid: Sequence[int], cell_size: int, rank: int, variant: str):
    """FMA with the projections of a full attention, its kernels at their start value."""
    levels = num_levels(tuple(grid), cell_size)
    dim = attention.proj.in_features
    layer = dense.DenseFMA2d(dim, attention.num_heads, cell_size, rank, levels=levels, variant=variant)
    layer.qkv, layer.proj = attention.qkv, attention.proj
    return layer


def squares(layer: dense.DenseFMA2d, x: Tensor, level: int | None) -> tuple[Tensor, Tensor]:
    """Squared norms of the error and of full attention's output, of all levels or of one alone."""
    q, k, v = layer.project(x)
    options = layer.call_options()
    kernels = [options[f"{kind}_kernels"] for kind in ("key", "value", "query")]
    everything = set(range(1, num_levels(tuple(x.shape[1:3]), layer.cell_size) + 1))
    exact = set() if level is None else everything - {level}
    cells = dict(cell_size=layer.cell_size, rank=layer.rank)
    with torch.no_grad():
        truth = dense.attention(q, k, v, [], [], None, exact=everything, **cells)
    found = dense.attention(q, k, v, *kernels, exact=exact, **cells)
    return (found - truth).square().sum(), truth.square().sum()


@torch.inference_mode()
def error(layers: Sequence[dense.DenseFMA2d], seen: Sequence[Tensor], level: int | None) -> float:
    """The relative error, averaged over the layers that have the level (any level for None)."""
    shares = []
    for layer, x in zip(layers, seen, strict=True):
        if layer.levels >= (level or 1):
            parts = torch.tensor([squares(layer, part, level) for part in x.split(50)]).sum(0)
            shares.append((parts[0] / parts[1]).sqrt().item())
    return sum(shares) / len(shares)


def tune(layers: Sequence[dense.DenseFMA2d], model: nn.Module, task: Task, seed: int, steps: int, shown: str) -> None:
    """Lessen the error of all levels on features of training images, by the kernels alone."""
    kernels = [layer.kernels for layer in layers if layer.kernels is not None]
    optimizer = torch.optim.Adam(kernels, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in trange(steps, desc=shown, unit="step", dynamic_ncols=True, mininterval=5):
        images, _ = task.draw(np.random.default_rng((seed, step)), task.batch_size)
        parts = [squares(*pair, None) for pair in zip(layers, features(model, images), strict=True)]
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
    most = max(num_levels(tuple(x.shape[1:3]), cell_size) for x in seen)
    if not most:
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
                for level in (None, *range(1, most + 1)):
                    yield setting | dict(level=level or ALL, error=error(layers, seen, level))


def table(rows: Sequence[dict]) -> report.Table:
    """A line for each variant and rank: errors of all levels and of each, and scores, start value and tuned."""
    levels = sorted({row["level"] for row in rows} - {ALL})
    header = ["variant", "rank", "kernels", "error, all levels", *(f"level {level} alone" for level in levels)]
    lines = []
    for case in dict.fromkeys((row["variant"], row["rank"], row["kernels"]) for row in rows):
        own = {row["level"]: row for row in rows if (row["variant"], row["rank"], row["kernels"]) == case}
        shown = [f"{100 * float(own[level]['error']):.1f} %" for level in (ALL, *levels)]
        line = [VARIANTS[case[0]], case[1], case[2], *shown]
        lines.append([*line, f"{float(own[ALL]['score']):.1f}", f"{float(own[ALL]['full_score']):.1f}"])
    return [*header, "score after the swap, %", "full attention, %"], lines


def draw(rows: Sequence[dict]) -> Figure:
    """Error by rank for each level, and the score after the swap by rank; start value dashed, tuned solid."""
    variants, levels = (list(dict.fromkeys(row[name] for row in rows)) for name in ("variant", "level"))
    figure = Figure(figsize=(9.5, 7.2), layout="constrained")
    axes = figure.subplots(2, len(variants), squeeze=False, sharey="row")
    for column, variant in enumerate(variants):
        for kernels, style in zip(KERNELS, ("--", "-"), strict=True):
            for i, level in enumerate(levels):
                own = [r for r in rows if (r["variant"], r["kernels"], r["level"]) == (variant, kernels, level)]
                ranks = [r["rank"] for r in own]
                name = f"{'all levels' if level == ALL else f'level {level} alone'}, {kernels}"
                look = dict(linestyle=style, marker="os^D"[i % 4], color=f"C{i}", label=name)
                axes[0, column].plot(ranks, [100 * float(r["error"]) for r in own], **look)
                if level == ALL:
                    axes[1, column].plot(ranks, [float(r["score"]) for r in own], **look | dict(label=kernels))
        axes[1, column].axhline(float(rows[0]["full_score"]), color="0.4", linewidth=1, label="full attention")
        axes[0, column].set_title(VARIANTS[variant], fontsize=10)
        axes[0, column].set_ylabel("relative error of the output, %" if column == 0 else "")
        axes[1, column].set_ylabel("score after the swap, %" if column == 0 else "")
        for one in axes[:, column]:
            one.set_xlabel("rank (summary tokens a coarse cell)")
            one.set_ylim(bottom=0)
            one.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8)
    axes[1, -1].legend(fontsize=8, loc="lower right")
    figure.supxlabel(f"{rows[0]['task']}, cell size {rows[0]['cell_size']}", fontsize=8, color="0.35")
    return figure


@ending(ValueError)
def main(argv: list[str] | None = None) -> None:
    """Measure, write, draw."""
    args = parse(argv)
    if not args.state.exists():
        train = "tools/compare_attention.py --tasks look_afar --variants full --seeds 0 --results out/quality"
        raise InputError(f"there is no {args.state}; python {train} trains such a model")
    model, run = runs.trained_model(args.state)
    if run.variant != "full":
        raise InputError(f"{args.state} is of a run with {VARIANTS[run.variant]}, not with full attention")
    facts = origin()
    found = measure(model, run, args.cell_size or run.cells[0], args.rank, args.variants, args.steps)
    rows = [{name: runs.as_text((row | facts)[name]) for name in COLUMNS} for row in found]
    write_rows(args.out, COLUMNS, rows)
    print(f"\n{report.plain(table(rows))}\n\n{args.out}\n{report.save(draw(rows), args.figure)}")


if __name__ == "__main__":
    sys.exit(main())
