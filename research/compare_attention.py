"""Trains one small skeleton with seven attention layers and compares what they learn.

The layers: Fast Multipole Attention, linear, log-linear, and linear with mean aggregation; its near field only; windows
(Swin's, shifted in every second block); spatial reduction (MiT's); full attention. All get the same blocks, steps and
batches, and parameters within 3 % (the width of the Mix-FFN is adapted).

    python -m research.compare_attention             # all tasks: generated scenes, look afar, dashed paths
    python -m research.compare_attention --sweep     # cell size and rank: score, and the operator's time and memory
    python -m research.compare_attention --report    # tables and figures from the files, no training

Finished runs are in the results files and are not made again; a run that was stopped goes on from its last saved point.
The tasks are small and generated: what is learned on them says little about photographs.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks import operator_benchmark
from benchmarks.harness import GateError, Limits
from benchmarks.harness import run as measure
from benchmarks.records import ROOT, Results, append_rows
from benchmarks.records import read_rows as read_costs
from fma2d.geometry import tiling
from tools.ending import GOES_ON, ending

from . import approximation
from .quality import report, runs
from .quality.model import VARIANTS, matched_ratio
from .quality.tasks import TASKS
from .trials import FIGURES, RESULTS, make_missing

SEEDS = (0, 1)
SWEEP_TASK = "look_afar"
NOT_RUN = "*Not run yet: there is no such row in `research/results`.*"
PAGE = ROOT / "research" / "quality.md"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    add("--variants", nargs="+", choices=VARIANTS, metavar="LAYER", help=f"of {', '.join(VARIANTS)} (all)")
    add("--seeds", nargs="+", type=int, help="(0 1; in a sweep 0)")
    add("--steps", type=int, help="of a run, a multiple of 10 (each task's own)")
    add("--sweep", action="store_true", help=f"cell sizes and ranks of linear and log-linear FMA, on {SWEEP_TASK}")
    add("--cell-size", type=int, nargs="+", help="of a sweep, in all stages (1 2 4)")
    add("--rank", type=int, nargs="+", help="of a sweep, summary tokens a coarse cell (1 4)")
    add("--side", type=int, default=64, help="tokens a side at which a sweep measures the operator (64; 0: not at all)")
    add("--report", action="store_true", help="train nothing")
    add("--output", type=Path, default=ROOT / "out" / "quality", help="folder of the runs' states (out/quality)")
    add("--results", type=Path, default=RESULTS, help="folder of the CSVs (research/results)")
    args = parser.parse_args(argv)
    if not args.sweep and (args.cell_size or args.rank):
        parser.error("--cell-size and --rank are for --sweep; a comparison has each task's own")
    if args.sweep and (args.tasks or [SWEEP_TASK]) != [SWEEP_TASK]:
        parser.error(f"--sweep is on {SWEEP_TASK}")
    if min(args.seeds or [0]) < 0:
        parser.error("--seeds must be at least 0")
    return args


def plan(args: argparse.Namespace) -> list[runs.Run]:
    """The runs that were asked for, each checked before any work.

    Raises:
        InputError: for a comparison that would say nothing, see `research.quality.model.levels` and `matched_ratio`.
    """
    names = args.tasks or ([SWEEP_TASK] if args.sweep else TASKS)
    seeds = args.seeds or ([0] if args.sweep else SEEDS)
    variants = args.variants or (report.SWEEP_VARIANTS if args.sweep else VARIANTS)
    cells = args.cell_size or ([1, 2, 4] if args.sweep else [None])
    ranks = args.rank or ([1, 4] if args.sweep else [None])
    pairs = [(cell, rank) for cell in cells for rank in ranks if not args.sweep or can_learn(cell, rank)]
    found = [
        runs.make_run(TASKS[name], variant, seed, args.steps, cell, rank)
        for name in names
        for seed in seeds
        for cell, rank in pairs
        for variant in variants
    ]
    for run in found:
        matched_ratio(TASKS[run.task], run.variant, run.cells, run.rank)
    return found


def can_learn(cell_size: int, rank: int) -> bool:
    """Whether a cell has learned kernels for so many summary tokens; says if not."""
    parts = tiling(rank, 2)
    fits = not any(cell_size % p for p in parts)
    if not fits:
        print(f"left out: rank {rank} tiles a cell as {parts}, which does not divide cell size {cell_size}")
    return fits


def train(planned: Sequence[runs.Run], output: Path, results: Path, curves: Path) -> None:
    """Make the runs that the results file does not hold, each one's row and curve kept as it ends."""
    with tqdm(unit="step", dynamic_ncols=True, mininterval=5) as bar:

        def make(run: runs.Run, place: str) -> dict[str, str]:
            def progress(steps: int, score: float | None) -> None:
                bar.set_description(f"{place} {run}" + ("" if score is None else f": {score:.1f} %"), refresh=False)
                bar.update(steps)

            row, points = runs.train(run, output / run.folder, progress)
            append_rows(curves, runs.CURVE_COLUMNS, [runs.as_row(point, runs.CURVE_COLUMNS) for point in points])
            bar.write(f"{run}: {TASKS[run.task].measure} {float(row['score']):.1f} %, {row['cpu_seconds']} s of CPU")
            return row

        make_missing(planned, results, runs.COLUMNS, runs.KEY, lambda run: run.key, make)


def measure_operator(planned: Sequence[runs.Run], side: int, path: Path) -> None:
    """Time and memory of the operator, forward and backward, for the cells of a sweep and for cells of 8 and 16."""
    ranks = sorted({run.rank for run in planned})
    cells = sorted({run.cells[0] for run in planned} | {8, 16})
    shape = dict(
        grids=[(side, side)], modes=["forward+backward"], variants=report.SWEEP_VARIANTS, head_dim=32, peers=()
    )
    places = [(cell, rank) for cell in cells for rank in ranks if not any(cell % p for p in tiling(rank, 2))]
    tasks = [t for cell, rank in places for t in operator_benchmark.tasks(**shape, cell_size=cell, rank=rank)]
    measure(tasks, Results(path), Limits())


class Recorded:
    """What the files of a folder hold: runs, their curves, those of a sweep, operator costs, approximations."""

    def __init__(self, folder: Path):
        self.rows = runs.read_rows(folder / "quality.csv", runs.COLUMNS)
        self.points = runs.read_rows(folder / "quality_curves.csv", runs.CURVE_COLUMNS)
        self.sweep = report.swept(self.rows, SWEEP_TASK)
        self.costs = read_costs(folder / "quality_operator.csv")
        file = folder / "quality_approximation.csv"
        self.swapped = runs.read_rows(file, approximation.COLUMNS, approximation.SETTING)

    def fill(self, page: str) -> str:
        """The page with its tables made anew."""

        def piece(table: Callable[..., report.Table], rows: list[dict], *more, note: str = "") -> str:
            return f"{report.markdown(table(rows, *more))}\n\n{note}{report.origin(rows)}" if rows else NOT_RUN

        def of_task(task: str) -> str:
            rows = report.compared(self.rows, task)
            return piece(report.comparison, rows, task, note=f"{report.training_of(rows)}; " if rows else "")

        pieces = {task: partial(of_task, task) for task in TASKS}
        setting = report.sweep_setting(self.sweep, self.costs)
        pieces["sweep"] = lambda: piece(report.sweep_table, self.sweep, self.costs, note=f"{setting}; ")
        pieces["approximation"] = lambda: piece(approximation.table, self.swapped)
        return report.fill_page(page, pieces)


def write_reports(recorded: Recorded, figures: Path, tasks: Collection[str], sweep: bool) -> None:
    """Print the tables of tasks, and of the sweep and the approximation if asked; draw their figures."""
    for task in tasks:
        if own := report.compared(recorded.rows, task):
            print(f"\n{TASKS[task].what}\n\n{report.plain(report.comparison(own, task))}\n\n{report.origin(own)}")
            print(report.save(report.curves_figure(recorded.points, task), figures / f"quality_{task}.png"))
    if sweep and (recorded.sweep or recorded.costs):
        print(f"\ncell size and rank\n\n{report.plain(report.sweep_table(recorded.sweep, recorded.costs))}")
        print(report.save(report.sweep_figure(recorded.sweep, recorded.costs), figures / "quality_sweep.png"))
    if sweep and recorded.swapped:
        print(report.save(approximation.draw(recorded.swapped), figures / "quality_approximation.png"))


@ending(GateError, interrupted=GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Make what is missing and report."""
    args, tasks = parse(argv), TASKS
    if not args.report:
        planned = plan(args)
        train(planned, args.output, args.results / "quality.csv", args.results / "quality_curves.csv")
        tasks = [] if args.sweep else dict.fromkeys(run.task for run in planned)
        if args.sweep and args.side:
            measure_operator(planned, args.side, args.results / "quality_operator.csv")
    own = args.results.resolve() == RESULTS
    recorded = Recorded(args.results)
    write_reports(recorded, FIGURES if own else args.results, tasks, args.sweep or args.report)
    if own:
        PAGE.write_text(recorded.fill(PAGE.read_text()))


if __name__ == "__main__":
    sys.exit(main())
