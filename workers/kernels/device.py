"""Copies to a device that do not wait for it."""

from __future__ import annotations

import torch


def moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Return a tensor of host memory on a device, copied there without waiting for it; others as they are."""
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
