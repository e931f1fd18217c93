"""What a result was measured on, for result files: date, build, versions, processor."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from protos.node.build_id import build_id


def environment() -> dict[str, Any]:
    """Facts of this machine and installation as plain data."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": importlib.metadata.version("longreach"),
        "build": build_id(),
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "ray": importlib.metadata.version("ray"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpu() -> str:
    """Processor name and the features that decide its speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    features = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(features) or 'no vector extensions named'})"
