"""Compares attention in text models on this machine: what it learns, what it costs.

    python tools/compare_text.py table      # fma (rank 1 and 4), mean, local, full: the same skeleton, equal parameters
    python tools/compare_text.py width      # the same rows with equally wide MLPs instead of equal parameters
    python tools/compare_text.py sweep      # fma: cell size 4, 8, 16, 32 by rank 1, 2, 4, 8
    python tools/compare_text.py runtime    # time and memory for 256 to 16384 tokens; no training

Each row but those of runtime is a training of tools/train_text.py, by default on the embedded text: the text found
inside the Python installation. The same command goes on where it was stopped. CSV files go to benchmarks/results,
figures to docs/figures.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import text_benchmark
from benchmarks.harness import GateError, Limits, idle_cpus, run, text_table
from benchmarks.records import ROOT, Results, total_mib
from tools.ending import GOES_ON, InputError, ending
from tools.text import comparison, figures
from tools.text.recipe import TextRecipe
from tools.training.recipe import make_recipe, read_values

RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
UPDATES = dict(table=1800, width=1800, sweep=720)
VALIDATIONS = dict(table=15, width=15, sweep=6)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--recipe", type=Path, default=ROOT / "configs" / "text" / "compare.yaml", help="(configs/text/compare.yaml)")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="for CSV files (benchmarks/results)")
    add("--figures", type=Path, default=FIGURES, metavar="DIR", help="for figures (docs/figures)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--threads", type=int, default=1, help="of a process (1; two beside other busy programs are slower than one)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="comparison", metavar="table|width|sweep|runtime", required=True)
    for name, updates in UPDATES.items():
        add = which.add_parser(name, parents=[common], help=f"train the rows of the {name}").add_argument
        add(
            "--updates",
            type=int,
            default=updates,
            help=f"of each training, a multiple of {VALIDATIONS[name]} ({updates})",
        )
        add("--workers", type=int, default=1, help="trainings at a time (1; on an idle machine, one a processor)")
        add("--data", type=Path, metavar="FILE", help="train on this file's bytes instead of the recipe's text")
        add("--report", action="store_true", help="train nothing: write what is finished")
        add("--seed", type=int, default=0, help="rows of other seeds in the CSV stay, figures show the mean (0)")
        add("--output", type=Path, default=ROOT / "out" / "text_compare", metavar="DIR", help="for the runs")
    add = which.add_parser("runtime", parents=[common], help="time and memory by length").add_argument
    add("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048, 4096, 8192, 16384], help="(256 to 16384)")
    add("--time-budget", type=float, default=60, help="seconds for one call; what takes longer is skipped (60)")
    add("--repeat", type=float, default=2, help="seconds to repeat a call; a longer one is made once (2)")
    add("--fresh", action="store_true", help="measure what the file holds already, too")
    args = parser.parse_args(argv)
    if args.comparison != "runtime":
        validations = VALIDATIONS[args.comparison]
        if args.updates < validations or args.updates % validations or args.workers < 1:
            parser.error(f"--updates must be a multiple of {validations}, --workers at least 1")
        if args.data and not args.data.is_file():
            parser.error(f"there is no file {args.data}")
    return args


@ending(GateError, interrupted=GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Compare; 1 if a training fails."""
    args = parse(argv)
    base = make_recipe(read_values(args.recipe, TextRecipe), str(args.recipe), TextRecipe)
    return runtime(args, base) if args.comparison == "runtime" else trained(args, base)


def trained(args: argparse.Namespace, base: TextRecipe) -> int:
    """Table, width or sweep: train what is missing, write and print."""
    name = args.comparison
    epochs = dict(epochs=VALIDATIONS[name], updates_per_epoch=args.updates // VALIDATIONS[name])
    base = dataclasses.replace(base, seed=args.seed, source="bytes" if args.data else base.source, **epochs)
    folder = args.output / f"{name}-{args.updates}-seed{args.seed}"
    files = [args.results / f"text_{name}{part}.csv" for part in ("", "_curves")]
    recorded = comparison.Recorded.read(*files)
    rows = getattr(comparison, f"{name}_rows")(base, folder)
    failed = [] if args.report else comparison.train(rows, args.data, args.device, args.workers, args.threads)
    done = [row for row in rows if row.is_finished]
    if not done:
        raise InputError(f"no row is finished in {folder}")
    costs = step_costs(args, folder, done)
    origin = (args.device, args.threads)
    found = [comparison.csv_row(row, *cost, *origin) for row, cost in zip(done, costs, strict=True)]
    recorded = recorded.with_seed(found, [point for row in done for point in row.curve])
    recorded.write(*files)
    figure = figures.sweep_figure(recorded) if name == "sweep" else figures.table_figure(recorded)
    figures.save(figure, args.figures / f"text_{name}.png")
    machine, torch, text = (found[0][key] for key in ("machine", "torch", "text"))
    print(f"\n{machine}, {args.threads} thread(s), torch {torch}; text {text[:12]}")
    print(f"{args.updates} updates of {base.batch_size} x {base.context} bytes\n")
    print(f"{score_table(recorded.rows)}\n\nrows in {files[0]}")
    for row in failed:
        print(f"failed: {row}", file=sys.stderr)
    return 1 if failed else 0


def step_costs(args: argparse.Namespace, folder: Path, rows: list[comparison.Row]) -> list[tuple[str, str]]:
    """Median ms and peak MiB of a training step of each row, measured in a process of its own."""
    tasks = [
        task
        for recipe in (row.recipe for row in rows)
        for task in text_benchmark.tasks(
            [(recipe.attention, recipe.rank)],
            [recipe.context],
            ["forward+backward"],
            mlp_ratios=[recipe.mlp_ratio],
            batch=recipe.batch_size,
            **skeleton(recipe),
            device=args.device,
            threads=args.threads,
        )
    ]
    found = run(tasks, Results(folder / "steps.csv"), Limits(repeat_seconds=1.0))
    return [(row["median_ms"], f"{total_mib(row):.0f}" if row["peak_mib"] else "") for row in found]


def skeleton(recipe: TextRecipe) -> dict:
    """The recipe's model for `text_benchmark.tasks`."""
    heads = recipe.num_heads
    shape = dict(heads=heads, head_dim=recipe.dim // heads, depth=recipe.depth, cell_size=recipe.cell_size)
    return shape | dict(options={key: getattr(recipe, key) for key in ("position", "conv_reach", "count_bias")})


def score_table(rows: list[dict]) -> str:
    """The rows for the eye."""
    columns = dict(name="attention", seed="seed", params="parameters", bits="bits", bits_second_half="second half")
    columns |= dict(processor_ms="processor ms", step_ms="step ms", peak_mib="peak MiB", bits_by_place="bits by place")
    return text_table([*columns.values()], [[row[key] for key in columns] for row in rows])


def runtime(args: argparse.Namespace, base: TextRecipe) -> int:
    """Measure, write and print."""
    idle_cpus()  # warns
    tasks = text_benchmark.tasks(
        comparison.ATTENTIONS, args.lengths, **skeleton(base), device=args.device, threads=args.threads
    )
    results = Results(args.results / "text_runtime.csv")
    rows = run(tasks, results, Limits(args.time_budget, repeat_seconds=args.repeat), args.fresh)
    print(f"\n{rows[0]['machine']}, threads: {rows[0]['threads']}, torch {rows[0]['torch']}\n")
    print(text_benchmark.table(rows))
    if any(row["status"] == "ok" for row in rows):
        figures.save(figures.runtime_figure(rows), args.figures / "text_runtime.png")
    print(f"\nrows in {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
