"""Benchmarks: `harness` measures and records, the others say what; `python -m benchmarks` runs them."""
