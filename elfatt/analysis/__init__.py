"""Benchmarks and the paper's tables, on top of the package and the task folders' programs."""
