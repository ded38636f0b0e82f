"""Draws figures of time and memory from results files of tools/benchmark.py; see --help."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.figures import write_figures
from benchmarks.records import read_rows
from tools.ending import ending


@ending()
def main(argv: list[str] | None = None) -> int:
    """Draw; 1 if there is nothing to draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, help="CSV files, such as benchmarks/results/operator.csv")
    parser.add_argument("--out", type=Path, help="folder of the PNGs (default: beside the first file)")
    args = parser.parse_args(argv)
    if missing := [str(path) for path in args.results if not path.exists()]:
        parser.error(f"there is no {', '.join(missing)}")
    rows = [row for path in args.results for row in read_rows(path)]
    paths = write_figures(rows, args.out or args.results[0].parent)
    print("\n".join(map(str, paths)) or "no row with a result")
    return 0 if paths else 1


if __name__ == "__main__":
    sys.exit(main())
