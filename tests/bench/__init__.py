"""Benchmarks: `make bench`. Each module prints JSON lines, one a figure, beside a baseline of the same run."""
