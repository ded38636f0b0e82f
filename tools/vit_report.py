"""What fma2d.convert_attention does to a ViT: cost against resolution, and how far outputs are from the original's.

    python tools/vit_report.py cost          # time and memory, a process for each row; results/vit.csv
    python tools/vit_report.py difference    # relative difference of the last features; results/vit_difference.csv
    python tools/vit_report.py trained       # the same of a tiny ViT, trained first; results/vit_trained.csv

Weights are random in the first two: costs do not depend on them, differences do. The photo is matplotlib's, 512 x 600
px, enlarged for larger sizes. The third takes some minutes: it trains on scikit-learn's digits, which are 8 x 8 px
whatever size they are brought to, so it says what averaging does to trained attention, nothing about real images. Costs
are worth measuring on a quiet machine only.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm import create_model, is_model
from timm.models import VisionTransformer
from tqdm import tqdm

from benchmarks import vit_benchmark
from benchmarks.harness import GateError, Limits, idle_cpus, run, text_table
from benchmarks.records import ROOT, Results, origin, write_rows
from tools.arguments import positive
from tools.ending import GOES_ON, ending
from tools.training.model import no_model

ORIGIN = ("torch", "timm", "fma2d", "commit", "command")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--variants", nargs="+", choices=vit_benchmark.VARIANTS, default=vit_benchmark.VARIANTS, help="(both)")
    add("--rank", type=positive, default=4, help="summary tokens per coarse cell (4)")
    add("--threads", type=positive, help="on the CPU (torch's choice)")
    add("--out", type=Path, help="results file (the one in benchmarks/results)")
    large = argparse.ArgumentParser(add_help=False)
    add = large.add_argument
    add("--models", nargs="+", default=vit_benchmark.DEFAULT, help=f"timm ViTs ({' '.join(vit_benchmark.DEFAULT)})")
    add("--sizes", nargs="+", type=positive, default=[224, 512, 1024], help="pixels, to the next patch (224 512 1024)")
    add("--cell-size", type=positive, default=8, help="patches per side of a base cell (8)")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_subparsers(dest="report", metavar="REPORT", required=True)
    add = which.add_parser("cost", help="time and memory", parents=[common, large]).add_argument
    add("--batch", type=positive, default=1, help="batch size (1)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of everything (float32)")
    add("--time-budget", type=float, default=120, help="seconds for one call; what takes longer is skipped (120)")
    add("--memory-budget", type=float, help="GiB for a row on the CPU (nine tenths of what is free)")
    add("--repeat", type=float, default=3, help="seconds to repeat a call; a longer one is made once (3)")
    add("--fresh", action="store_true", help="measure what the file holds already, too")
    add = which.add_parser("difference", help="of the last features", parents=[common, large]).add_argument
    add("--spreads", nargs="+", type=float, default=[1, 3], help="standard deviations of attention scores (1 3)")
    add = which.add_parser("trained", help="difference of a tiny trained ViT", parents=[common]).add_argument
    add("--sizes", nargs="+", type=positive, default=[32, 64], help="pixels a side of the test images (32 64)")
    add("--cell-size", type=positive, default=2, help="patches per side of a base cell (2)")
    add("--epochs", type=positive, default=40, help="of the training (40)")
    args = parser.parse_args(argv)
    for name in getattr(args, "models", []):
        if not is_model(name):
            parser.error(no_model(name))
        with torch.device("meta"):
            if not isinstance(create_model(name), VisionTransformer):
                parser.error(f"{name} is no VisionTransformer of timm, which this is about")
    if args.report == "cost" and args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    return args


def cost(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a row fails."""
    idle_cpus()  # warns
    tasks = vit_benchmark.tasks(
        args.models,
        args.sizes,
        args.variants,
        args.batch,
        args.cell_size,
        args.rank,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
    )
    results = Results(args.out or ROOT / "benchmarks" / "results" / "vit.csv")
    rows = run(tasks, results, Limits(args.time_budget, args.memory_budget, args.repeat), args.fresh)
    print(f"\n{rows[0]['machine']}, threads: {rows[0]['threads']}, torch {rows[0]['torch']}, {args.dtype}\n")
    print(vit_benchmark.table(rows))
    print(f"\nrows in {results.path}")
    return int(any(row["status"].startswith("failed") for row in rows))


def difference(args: argparse.Namespace) -> int:
    """Compute, print and write, the file anew."""
    if args.threads:
        torch.set_num_threads(args.threads)
    options = dict(variants=args.variants, cell_size=args.cell_size, rank=args.rank)
    if args.report == "trained":
        rows = vit_benchmark.trained_differences(args.sizes, args.epochs, **options)
    else:
        from matplotlib.cbook import get_sample_data

        photo = str(get_sample_data("grace_hopper.jpg", asfileobj=False))
        cases = list(product(args.models, args.sizes, args.spreads))
        bar = tqdm(cases, unit="model", dynamic_ncols=True)
        rows = [row for case in bar for row in vit_benchmark.random_differences(*case, photo, **options)]
    path = args.out or ROOT / "benchmarks" / "results" / f"vit_{args.report}.csv"
    source = origin(threads=args.threads)
    write_rows(path, [*rows[0], *ORIGIN], [row | source for row in rows])
    print(f"\n{text_table(list(rows[0]), [list(row.values()) for row in rows])}\n\nrows in {path}")
    return 0


@ending(GateError, interrupted=f"{GOES_ON} (cost), or from the beginning (difference, trained)")
def main(argv: list[str] | None = None) -> int:
    """Make a report."""
    args = parse(argv)
    return cost(args) if args.report == "cost" else difference(args)


if __name__ == "__main__":
    sys.exit(main())
