"""The evidence: comparisons, their results and figures. Imports tools and benchmarks, and nothing imports it."""
