"""Benchmarks: `harness` measures and records, the others say what; `tools/benchmark.py` runs them."""
