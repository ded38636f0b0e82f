"""Measures the operator, the models or whole-image segmentation against their peers on this machine; see --help.

Every row is measured in a process of its own and appended to a CSV file at once. A run that is started again goes on
where it stopped. Figures are made from the file by tools/plot.py.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import model_benchmark, operator_benchmark, segmentation_benchmark
from benchmarks.harness import GateError, Limits, Task, idle_cpus, run
from benchmarks.operator_benchmark import VARIANTS
from benchmarks.records import ROOT, Results
from tools.arguments import positive
from tools.ending import GOES_ON, ending


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of everything (float32)")
    add("--threads", type=positive, help="on the CPU (torch's choice)")
    add("--time-budget", type=float, default=200, help="seconds for one call; what takes longer is skipped (200)")
    add("--memory-budget", type=float, help="GiB for a row on the CPU (nine tenths of what is free)")
    add("--repeat", type=float, default=3, help="seconds to repeat a call; a longer one is made once (3)")
    add("--fresh", action="store_true", help="measure what the file holds already, too")
    add("--out", type=Path, help="results file (benchmarks/results/BENCHMARK.csv)")

    attention = argparse.ArgumentParser(add_help=False)
    add = attention.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=["linear"], help="of FMA2D (linear)")
    add("--cell-size", type=positive, default=8, help="of FMA2D: tokens per side of a base cell (8)")
    add("--rank", type=positive, default=4, help="of FMA2D: summary tokens per coarse cell (4)")
    add("--batch", type=positive, default=1, help="batch size (1)")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    parents = [attention, common]
    add = which.add_parser("operator", help="attention alone, against dense attention", parents=parents).add_argument
    add("--grids", nargs="+", type=positive, default=[64, 128, 256], help="tokens a side (64 128 256)")
    add("--modes", nargs="+", choices=operator_benchmark.MODES, default=operator_benchmark.MODES, help="(both)")
    add("--heads", type=positive, default=2, help="(2)")
    add("--head-dim", type=positive, default=64, help="channels of a head (64)")
    add = which.add_parser("model", help="whole models, against Swin, ViT and MiT", parents=parents).add_argument
    add("--sizes", nargs="+", type=positive, default=[224, 512, 1024], help="pixels a side (224 512 1024)")
    add("--modes", nargs="+", choices=model_benchmark.MODES, default=["inference"], help="(inference)")
    names = " ".join(model_benchmark.DEFAULT)
    add("--models", nargs="+", default=model_benchmark.DEFAULT, help=f"timm names, mit_b0, mit_b2, mit_b3 ({names})")
    about = "image to classes, against mmsegmentation's MiT"
    add = which.add_parser("segmentation", help=about, parents=[common]).add_argument
    modes, names = segmentation_benchmark.MODES, ", ".join(segmentation_benchmark.MODELS)
    add("--sizes", nargs="+", type=positive, default=[512, 1024, 2048], help="pixels a side (512 1024 2048)")
    add("--modes", nargs="+", choices=modes, default=modes, help="(both)")
    add("--models", nargs="+", default=["fma2d_tiny", "mit_b2"], help=f"of {names} (fma2d_tiny mit_b2)")
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    known = segmentation_benchmark.MODELS.__contains__ if args.benchmark == "segmentation" else model_benchmark.is_known
    if unknown := [name for name in getattr(args, "models", []) if not known(name)]:
        parser.error(f"unknown models: {', '.join(unknown)}")
    return args


def plan(args: argparse.Namespace) -> tuple[ModuleType, list[Task]]:
    """The benchmark that was asked for and its tasks; the operator's gate is passed first."""
    setting = dict(device=args.device, dtype=args.dtype, threads=args.threads)
    if args.benchmark == "segmentation":
        return segmentation_benchmark, segmentation_benchmark.tasks(args.models, args.sizes, args.modes, **setting)
    setting |= dict(batch=args.batch, cell_size=args.cell_size, rank=args.rank)
    setting |= dict(variants=args.variants, modes=args.modes)
    if args.benchmark == "model":
        return model_benchmark, model_benchmark.tasks(args.models, args.sizes, **setting)
    operator_benchmark.gate(args.device, args.dtype, "torch", args.variants)
    grids = [(n, n) for n in args.grids]
    return operator_benchmark, operator_benchmark.tasks(grids, heads=args.heads, head_dim=args.head_dim, **setting)


@ending(GateError, interrupted=GOES_ON)
def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a row fails."""
    args = parse(argv)
    idle_cpus()  # warns
    results = Results(args.out or ROOT / "benchmarks" / "results" / f"{args.benchmark}.csv")
    limits = Limits(args.time_budget, args.memory_budget, args.repeat)
    benchmark, tasks = plan(args)
    rows = run(tasks, results, limits, args.fresh)
    print(f"\n{rows[0]['machine']}, threads: {rows[0]['threads']}, torch {rows[0]['torch']}, {args.dtype}\n")
    print(benchmark.table(rows))
    print(f"\nrows in {results.path}")
    return int(any(row["status"].startswith("failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
