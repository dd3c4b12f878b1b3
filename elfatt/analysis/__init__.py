"""Benchmarks and the paper's tables: the top layer, which also runs the task folders' programs."""
