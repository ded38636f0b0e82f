"""Measures the operator or the models against their peers on this machine; see --help.

Every row is measured in a process of its own and appended to a CSV file at once. A run that is started again goes on
where it stopped. Figures are made from the file by tools/plot.py.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import model_benchmark, operator_benchmark
from benchmarks.harness import GateError, Limits, run
from benchmarks.records import ROOT, Results


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    common.add_argument("--variants", nargs="+", choices=operator_benchmark.VARIANTS, default=["linear"], help="of FMA2D")
    common.add_argument("--cell-size", type=int, default=8, help="of FMA2D: tokens per side of a base cell")
    common.add_argument("--rank", type=int, default=4, help="of FMA2D: summary tokens per coarse cell")
    common.add_argument("--batch", type=int, default=1, help="batch size")
    common.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    common.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of everything")
    common.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    common.add_argument("--time-budget", type=float, default=120, help="seconds that one call may take")
    common.add_argument("--memory-budget", type=float, help="GiB for one row on the CPU (default: 0.9 of what is free)")
    common.add_argument("--repeat", type=float, default=3, help="seconds to repeat a call; a longer one is made once")
    common.add_argument("--fresh", action="store_true", help="measure also what the file holds already")
    common.add_argument("--out", type=Path, help="results file (default: benchmarks/results/<benchmark>.csv)")

    parser = argparse.ArgumentParser(description=__doc__)
    which = parser.add_subparsers(dest="benchmark", required=True)
    shown = dict(parents=[common], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    one = which.add_parser("operator", help="attention alone, against dense attention", **shown)
    one.add_argument("--grids", nargs="+", type=int, default=[64, 128, 256], help="tokens a side")
    one.add_argument("--modes", nargs="+", choices=operator_benchmark.MODES, default=operator_benchmark.MODES, help="what")
    one.add_argument("--heads", type=int, default=2, help="heads")
    one.add_argument("--head-dim", type=int, default=64, help="channels of a head")
    two = which.add_parser("model", help="whole models, against Swin, ViT and MiT", **shown)
    two.add_argument("--sizes", nargs="+", type=int, default=[224, 512, 1024], help="pixels a side")
    two.add_argument("--modes", nargs="+", choices=model_benchmark.MODES, default=["inference"], help="what")
    two.add_argument("--models", nargs="+", default=model_benchmark.DEFAULT, help="timm names, or mit_b0, mit_b2, mit_b3")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a result is wrong."""
    args = parse(argv)
    setting = dict(device=args.device, dtype=args.dtype, threads=args.threads)
    shape = dict(batch=args.batch, cell_size=args.cell_size, rank=args.rank, variants=args.variants, modes=args.modes)
    limits = Limits(args.time_budget, args.memory_budget, args.repeat)
    results = Results(args.out or ROOT / "benchmarks" / "results" / f"{args.benchmark}.csv")
    try:
        if args.benchmark == "operator":
            benchmark = operator_benchmark
            benchmark.gate(args.device, args.dtype, "torch", args.variants)
            grids = [(n, n) for n in args.grids]
            tasks = benchmark.tasks(grids, heads=args.heads, head_dim=args.head_dim, **shape, **setting)
        else:
            benchmark = model_benchmark
            tasks = benchmark.tasks(args.models, args.sizes, **shape, **setting)
        rows = run(tasks, results, limits, args.fresh)
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        return 1
    print(f"\n{rows[0]['machine']}, {rows[0]['threads']} threads, torch {rows[0]['torch']}, {args.dtype}\n")
    print(benchmark.table(rows))
    print(f"\nrows in {results.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
