"""Kernels for GPUs in Triton, which is imported by the modules that define kernels alone."""

# Compute capabilities of GPUs that the tests of tests/gpu have passed on. On others the kernels are known from Triton's
# interpreter and compiler.
PROVEN_ON: frozenset[str] = frozenset()
