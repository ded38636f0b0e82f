"""The evidence: comparisons, their results and figures. Imports tools and benchmarks, and nothing imports it."""

from pathlib import Path

RESULTS, FIGURES = (Path(__file__).parent / name for name in ("results", "figures"))
