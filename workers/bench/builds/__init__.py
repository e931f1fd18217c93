"""Kernels of Triton compiled for GPUs that are not there: what shipped launches take, and whether that is allowed."""
