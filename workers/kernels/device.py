"""What code asks of a GPU before it chooses kernels, and copies to it that do not wait.

Tensors on the `meta` device have shapes and no content. They stand for those of an H200, so that a step can be traced
on any machine (workers/bench/trace.py).
"""

from __future__ import annotations

import functools
import importlib.util

import torch

AMPERE = (8, 0)  # compute capability of the first GPUs that the kernels of Triton are made for
_TRACED_CAPABILITY, _TRACED_PROCESSORS = (9, 0), 132  # of an H200


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; of a CPU, where kernels are interpreted, that of the oldest GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)
    return _TRACED_CAPABILITY if device.type == "meta" else AMPERE


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU; 1 for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _TRACED_PROCESSORS if device.type == "meta" else 1


def runs_triton(device: torch.device) -> bool:
    """Return whether kernels of Triton run on a device."""
    return device.type != "cpu" and has_triton() and capability(device) >= AMPERE


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor of host memory on a device, copied there without waiting for it; others as they are."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
