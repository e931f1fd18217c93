"""Kernels of Triton compiled for GPUs that are not there: what each shipped launch takes, and whether that is allowed."""
