"""Measures whole-image segmentation, from image to classes, against mmsegmentation's MiT; see --help.

As tools/benchmark.py: a process for each row, appended to a CSV file at once. Weights are random.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import segmentation_benchmark as benchmark
from benchmarks.harness import GateError, Limits, idle_cpus, run
from benchmarks.records import ROOT, Results


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--sizes", nargs="+", type=int, default=[512, 1024, 2048], help="pixels a side")
    add("--models", nargs="+", choices=benchmark.MODELS_KNOWN, default=["fma2d_tiny", "mit_b2"], help="to compare")
    add("--modes", nargs="+", choices=benchmark.MODES, default=benchmark.MODES, help="of inference")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of everything")
    add("--threads", type=int, help="on the CPU; None: torch's choice")
    add("--time-budget", type=float, default=300, help="seconds for one call; what takes longer is skipped")
    add("--memory-budget", type=float, help="GiB for a row on the CPU; None: nine tenths of what is free")
    add("--repeat", type=float, default=3, help="seconds to repeat a call; a longer one is made once")
    add("--fresh", action="store_true", help="measure what the file holds already, too")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "segmentation.csv", help="results file")
    args = parser.parse_args(argv)
    idle_cpus()  # warns
    limits = Limits(args.time_budget, args.memory_budget, args.repeat)
    setting = dict(device=args.device, dtype=args.dtype, threads=args.threads)
    try:
        rows = run(
            benchmark.tasks(args.models, args.sizes, args.modes, **setting), Results(args.out), limits, args.fresh
        )
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        return 1
    print(f"\n{rows[0]['machine']}, threads: {rows[0]['threads']}, torch {rows[0]['torch']}, {args.dtype}\n")
    print(benchmark.table(rows))
    print(f"\nrows in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
