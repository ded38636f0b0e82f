"""Trains one small skeleton with seven attention layers and compares what they learn.

The layers: Fast Multipole Attention, linear, log-linear, and linear with mean aggregation; its near field only; windows
(Swin's, shifted in every second block); spatial reduction (MiT's); full attention. All get the same blocks, steps and
batches, and parameters within 3 % (the width of the Mix-FFN is adapted).

    python -m research.compare_attention             # all tasks: generated scenes, look afar, dashed paths
    python -m research.compare_attention --report    # tables and figures from the files, no training

Finished runs are in the results files and are not made again; a run that was stopped goes on from its last saved point.
The tasks are small and generated: what is learned on them says little about photographs.
"""

import argparse
import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from benchmarks.records import ROOT, append_rows, commit
from tools.ending import GOES_ON, ending

from . import FIGURES, RESULTS, approximation
from .quality import report, runs
from .quality.model import VARIANTS, matched_ratio
from .quality.tasks import TASKS

NOT_RUN = "*Not run yet: there is no such row in `research/results`.*"
PAGE = ROOT / "research" / "quality.md"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="LAYER", help="(all)")
    add("--seeds", nargs="+", type=int, default=[0, 1], help="(0 1)")
    add("--steps", type=int, help="of a run, a multiple of 10 (each task's own)")
    add("--cell-size", type=int, help="of FMA, in all stages (each task's own)")
    add("--report", action="store_true", help="train nothing")
    add("--output", type=Path, default=ROOT / "out" / "quality", help="folder of the runs' states (out/quality)")
    add("--results", type=Path, default=RESULTS, help="folder of the CSVs (research/results)")
    args = parser.parse_args(argv)
    if min(args.seeds) < 0:
        parser.error("--seeds must be at least 0")
    return args


def plan(args: argparse.Namespace) -> list[runs.Run]:
    """The runs that were asked for, each checked before any work.

    Raises:
        InputError: for a comparison that would say nothing, see `research.quality.model.levels` and `matched_ratio`.
    """
    found = [
        runs.make_run(TASKS[name], variant, seed, args.steps, args.cell_size)
        for name in args.tasks
        for seed in args.seeds
        for variant in args.variants
    ]
    for run in found:
        matched_ratio(TASKS[run.task], run.variant, run.cells, run.rank)
    return found


def train(planned: Sequence[runs.Run], output: Path, results: Path, curves: Path) -> None:
    """Make the runs that the results file does not hold, each one's row and curve kept as it ends."""
    done = {tuple(row[name] for name in runs.KEY) for row in runs.read_rows(results, runs.COLUMNS)}
    missing = [run for run in planned if run.key not in done]
    print(f"{len(planned)} runs, {len(planned) - len(missing)} of them in {results}")
    if not missing:
        return
    commit()  # cached: what is written later is of the code that runs now
    with tqdm(total=sum(run.steps for run in missing), unit="step", dynamic_ncols=True, mininterval=5) as bar:
        for i, run in enumerate(missing, 1):

            def progress(steps: int, score: float | None, shown: str = f"{i}/{len(missing)} {run}") -> None:
                bar.set_description(shown if score is None else f"{shown}: {score:.1f} %", refresh=False)
                bar.update(steps)

            row, points = runs.train(run, output / run.folder, progress)
            append_rows(curves, runs.CURVE_COLUMNS, [runs.as_row(point, runs.CURVE_COLUMNS) for point in points])
            append_rows(results, runs.COLUMNS, [row])
            bar.write(f"{run}: {TASKS[run.task].measure} {float(row['score']):.1f} %, {row['cpu_seconds']} s of CPU")


class Recorded:
    """What the files of a folder hold: runs, their curves, approximations."""

    def __init__(self, folder: Path):
        self.rows = runs.read_rows(folder / "quality.csv", runs.COLUMNS)
        self.points = runs.read_rows(folder / "quality_curves.csv", runs.CURVE_COLUMNS)
        file = folder / "quality_approximation.csv"
        self.swapped = runs.read_rows(file, approximation.COLUMNS, approximation.SETTING)

    def fill(self, page: str) -> str:
        """The page with its tables made anew."""

        def piece(table: report.Table, rows: list[dict], note: str = "") -> str:
            return f"{report.markdown(table)}\n\n{note}{report.origin(rows)}"

        def of_task(task: str) -> str:
            rows = report.compared(self.rows, task)
            return piece(report.comparison(rows, task), rows, f"{report.training_of(rows)}; ") if rows else NOT_RUN

        pieces = {task: partial(of_task, task) for task in TASKS}
        pieces["approximation"] = lambda: piece(approximation.table(self.swapped), self.swapped)
        return report.fill_page(page, pieces)


def write_reports(recorded: Recorded, figures: Path, tasks: Collection[str]) -> None:
    """Print the tables of tasks and draw their figures."""
    for task in tasks:
        if own := report.compared(recorded.rows, task):
            print(f"\n{TASKS[task].what}\n\n{report.plain(report.comparison(own, task))}\n\n{report.origin(own)}")
            print(report.save(report.curves_figure(recorded.points, task), figures / f"quality_{task}.png"))


@ending(interrupted=GOES_ON)
def main(argv: list[str] | None = None) -> None:
    """Make what is missing and report."""
    args = parse(argv)
    if not args.report:
        train(plan(args), args.output, args.results / "quality.csv", args.results / "quality_curves.csv")
    own = args.results.resolve() == RESULTS
    recorded = Recorded(args.results)
    write_reports(recorded, FIGURES if own else args.results, args.tasks)
    if own:
        PAGE.write_text(recorded.fill(PAGE.read_text()))


if __name__ == "__main__":
    sys.exit(main())
