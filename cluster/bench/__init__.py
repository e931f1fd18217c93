"""Benchmarks of the whole service: what it costs over the bare data plane, and how fair it is."""
