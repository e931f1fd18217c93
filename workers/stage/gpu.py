"""The GPU of a stage process, and the cores that are near it.

Which GPUs a process sees is decided before it starts (`CUDA_VISIBLE_DEVICES`): where Ray has started it that is the one
it reserved. A process that was started by hand sees all of them and is told an index.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist

_E4M3_CAPABILITY = (8, 9)  # of the first GPUs that convert e4m3


def use_gpu(index: int) -> torch.device:
    """Make a GPU that of the calling thread and keep all threads of the process on its NUMA node; returns it.

    Raises:
        ValueError: this process sees no such GPU.
    """
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        seen = f"must be below {count}, the number of GPUs" if count else "there is no GPU"
        raise ValueError(f"gpu: {index}: {seen} that this process sees")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    if address := pci_address(torch.cuda.get_device_properties(device)):
        stay_on(near_cores(address))
    return device


def check_kv_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError if a GPU cannot compute with keys and values of this type, in one line with the way out."""
    if dtype != torch.float8_e4m3fn or device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < _E4M3_CAPABILITY:
        raise ValueError(
            f"kv_cache.dtype: fp8: needs a GPU of sm_89 or later, this is sm_{found[0]}{found[1]}; use int8"
        )


def gpu_id(device: torch.device) -> str:
    """Return what a GPU is called everywhere on its machine; empty for a CPU, or if GPUs cannot reach each other."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return ""
    return str(torch.cuda.get_device_properties(device).uuid)


def pci_address(properties: object) -> str:
    """Return the PCI address of a GPU as Linux writes it; empty where this version of torch does not know it."""
    parts = [getattr(properties, f"pci_{name}_id", None) for name in ("domain", "bus", "device")]
    if any(part is None for part in parts):
        return ""
    domain, bus, slot = parts
    return f"{domain:04x}:{bus:02x}:{slot:02x}.0"


def near_cores(address: str, system: Path = Path("/sys")) -> frozenset[int]:
    """Return the cores of the NUMA node of a PCI device; none where the machine does not say, or has no such nodes."""
    try:
        node = int((system / "bus/pci/devices" / address / "numa_node").read_text())
        if node < 0:
            return frozenset()
        text = (system / f"devices/system/node/node{node}/cpulist").read_text()
        return frozenset(
            core
            for part in text.strip().split(",")
            if part
            for core in range(int(part.partition("-")[0]), int(part.rpartition("-")[2]) + 1)
        )
    except (OSError, ValueError):
        return frozenset()


def stay_on(cores: Collection[int]) -> frozenset[int]:
    """Keep all threads of this process on those of `cores` that it may use; returns them, none if nothing changed.

    Memory that is touched from then on, pinned memory included, is that of the cores.
    """
    allowed = os.sched_getaffinity(0)
    chosen = allowed & frozenset(cores)
    if not chosen or chosen == allowed:
        return frozenset()
    for thread in os.listdir("/proc/self/task"):
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(int(thread), chosen)
    return frozenset(chosen)
