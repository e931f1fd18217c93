"""What a result file says about where it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "amx_fp16")


def describe(device: torch.device, date: str | None) -> dict[str, object]:
    """Date, commit, versions and hardware; `date` replaces the present moment."""
    facts: dict[str, object] = {
        "date": date or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device.type,
        "load_average": os.getloadavg()[0],
        "cpu": cpu(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": properties.name, "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
        }  # fmt: skip
    return facts


def cpu() -> dict[str, object]:
    """Model name, processors this process may use, and the instruction sets that decide matrix speed."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = set(value.split())
    return {"model": name, "count": len(os.sched_getaffinity(0)), "features": [f for f in _FEATURES if f in flags]}


def commit() -> str | None:
    """Commit of the working tree, with `+` when files differ from it; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() or None
