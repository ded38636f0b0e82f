"""Measures time and memory against peers on this machine: `python -m benchmarks BENCHMARK`; see --help.

Every row is measured in a process of its own and appended to a CSV file at once. A run that is started again goes on
where it stopped. `python -m benchmarks draw FILE...` makes figures from such files.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from timm.models import VisionTransformer

from benchmarks import model_benchmark, operator_benchmark, segmentation_benchmark, text_cache, vit_benchmark
from benchmarks.figures import write_figures
from benchmarks.harness import GateError, Limits, Task, idle_cpus, run
from benchmarks.records import ROOT, Results, read_rows
from tools.arguments import positive
from tools.ending import GOES_ON, InputError, ending
from tools.training.model import no_model

BENCHMARKS = dict(
    operator=operator_benchmark,
    model=model_benchmark,
    segmentation=segmentation_benchmark,
    vit=vit_benchmark,
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of everything (float32)")
    add("--threads", type=positive, help="on the CPU (torch's choice)")
    add("--time-budget", type=float, default=200, help="seconds for one call; what takes longer is skipped (200)")
    add("--total-budget", type=float, help="seconds for the whole run; what does not fit is skipped (any)")
    add("--memory-budget", type=float, help="GiB for a row on the CPU (nine tenths of what is free)")
    add("--repeat", type=float, default=3, help="seconds to repeat a call; a longer one is made once (3)")
    add("--fresh", action="store_true", help="measure what the file holds already, too")
    add("--out", type=Path, help="results file (benchmarks/results/BENCHMARK.csv)")

    attention = argparse.ArgumentParser(add_help=False)
    add = attention.add_argument
    add("--batch", nargs="+", type=positive, default=[1], help="one, or one for each size (1)")
    add("--cell-size", type=positive, default=8, help="of FMA2D: tokens per side of a base cell (8)")
    add("--rank", type=positive, default=4, help="of FMA2D: summary tokens per coarse cell (4)")

    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)

    def options(name: str, about: str, *parents: argparse.ArgumentParser, modes: Sequence[str] = (), default=None):
        add = which.add_parser(name, help=about, parents=[*parents, common]).add_argument
        if modes:
            add("--modes", nargs="+", choices=modes, default=default or modes, help=f"({', '.join(default or modes)})")
        return add

    variants = dict(nargs="+", choices=operator_benchmark.VARIANTS)
    add = options("operator", "attention alone, against dense attention", attention, modes=operator_benchmark.MODES)
    add("--variants", **variants, default=["linear"], help="of FMA2D (linear)")
    add("--sizes", nargs="+", type=positive, default=[64, 128, 256], help="tokens a side (64 128 256)")
    add("--table", action="store_true", help="the sizes and batches that people use, 8 to 256 tokens a side")
    add("--heads", type=positive, default=2, help="(2)")
    add("--head-dim", type=positive, default=64, help="channels of a head (64)")

    names = " ".join(model_benchmark.DEFAULT)
    about = "whole models, against Swin, ViT and MiT"
    add = options("model", about, attention, modes=model_benchmark.MODES, default=["inference"])
    add("--variants", **variants, default=["linear"], help="of FMA2D (linear)")
    add("--sizes", nargs="+", type=positive, default=[224, 512, 1024], help="pixels a side (224 512 1024)")
    add("--models", nargs="+", default=model_benchmark.DEFAULT, help=f"timm names, mit_b0, mit_b2, mit_b3 ({names})")
    add("--photo", help="file to run on (noise)")

    names = ", ".join(segmentation_benchmark.MODELS)
    about = "image to classes, against mmsegmentation's MiT"
    add = options("segmentation", about, modes=segmentation_benchmark.MODES)
    add("--sizes", nargs="+", type=positive, default=[512, 1024, 2048], help="pixels a side (512 1024 2048)")
    add("--models", nargs="+", default=["fma2d_tiny", "mit_b2"], help=f"of {names} (fma2d_tiny mit_b2)")

    names = " ".join(vit_benchmark.DEFAULT)
    add = options("vit", "ViTs with their attention converted, against the originals", attention)
    add("--variants", **variants, default=vit_benchmark.VARIANTS, help="(both)")
    add("--sizes", nargs="+", type=positive, default=[224, 512, 1024], help="pixels, to the next patch (224 512 1024)")
    add("--models", nargs="+", default=vit_benchmark.DEFAULT, help=f"timm ViTs ({names})")

    which.add_parser("text", add_help=False, help="a generated token, against a cache of all keys and values")
    add = which.add_parser("draw", help="figures of time and memory from results files").add_argument
    add("results", nargs="+", type=Path, help="CSV files, such as benchmarks/results/operator.csv")
    add("--out", type=Path, help="folder of the PNGs (beside the first file)")

    args = parser.parse_args(argv)
    if args.benchmark == "draw":
        if missing := [str(path) for path in args.results if not path.is_file()]:
            parser.error(f"there is no {', '.join(missing)}")
        return args
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    if getattr(args, "table", False):
        args.sizes, args.batch = (list(column) for column in zip(*operator_benchmark.TABLE, strict=True))
    args.batch = getattr(args, "batch", [1])  # a segmentation is of one image
    if len(args.batch) not in (1, len(args.sizes)):
        parser.error(f"--batch: give one, or one for each of the {len(args.sizes)} sizes")
    check_models(args)
    return args


def check_models(args: argparse.Namespace) -> None:
    """Raise InputError for a model that the benchmark does not know."""
    for name in getattr(args, "models", []):
        if args.benchmark == "segmentation":
            if name not in segmentation_benchmark.MODELS:
                raise InputError(f"--models: {name} is not one of {', '.join(segmentation_benchmark.MODELS)}")
        elif not model_benchmark.is_known(name):
            raise InputError(f"--models: {no_model(name)}")
        elif args.benchmark == "vit":
            with torch.device("meta"):
                if not isinstance(timm.create_model(name), VisionTransformer):
                    raise InputError(f"--models: {name} is no VisionTransformer of timm, which this is about")


def plan(args: argparse.Namespace) -> list[Task]:
    """The tasks that were asked for, the smaller sizes first; the operator's gate is passed before."""
    names = ("device", "dtype", "threads", "modes", "variants", "cell_size", "rank", "heads", "head_dim", "photo")
    setting = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    if args.benchmark == "operator":
        operator_benchmark.gate(args.device, args.dtype, "torch", args.variants)
    batches = args.batch * (len(args.sizes) // len(args.batch))
    found = []
    for size, batch in sorted(zip(args.sizes, batches, strict=True)):
        sizes = [(size, size)] if args.benchmark == "operator" else [size]
        subjects = [args.models] if "models" in args else []
        found += BENCHMARKS[args.benchmark].tasks(*subjects, sizes, batch=batch, **setting)
    return found


def draw(args: argparse.Namespace) -> int:
    """Draw figures; 1 if there is nothing to draw."""
    rows = [row for path in args.results for row in read_rows(path)]
    paths = write_figures(rows, args.out or args.results[0].parent)
    print("\n".join(map(str, paths)) or "no row with a result")
    return 0 if paths else 1


@ending(GateError, interrupted=GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a row fails."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["text"]:  # whose rows have columns, and whose figure has axes, of their own
        return text_cache.main(words[1:])
    args = parse(words)
    if args.benchmark == "draw":
        return draw(args)
    idle_cpus()  # warns
    results = Results(args.out or ROOT / "benchmarks" / "results" / f"{args.benchmark}.csv")
    limits = Limits(args.time_budget, args.memory_budget, args.repeat, args.total_budget)
    benchmark, tasks = BENCHMARKS[args.benchmark], plan(args)
    rows = run(tasks, results, limits, args.fresh)
    print(f"\n{rows[0]['machine']}, threads: {rows[0]['threads']}, torch {rows[0]['torch']}, {args.dtype}\n")
    print(benchmark.table(rows))
    if args.benchmark == "operator":
        print(f"\ntime of dense attention over that of fma2d\n\n{operator_benchmark.ratios(rows)}")
    print(f"\nrows in {results.path}")
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
