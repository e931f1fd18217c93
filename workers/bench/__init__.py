"""Benchmarks of the data plane, runnable on a machine that has only torch: `python -m workers.bench --help`."""
