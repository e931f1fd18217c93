"""Stage `env`: the card, its software and clocks, and its ceilings: a large matrix product and a large copy."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterator

import torch

from protos.node.environment import build_id, commit_id, environment
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Line

_QUERY = (
    "name", "driver_version", "vbios_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
    "power.draw", "power.limit", "temperature.gpu", "memory.total", "memory.used", "ecc.mode.current",
)  # fmt: skip
_LEAST = "name", "driver_version", "clocks.sm", "clocks.mem"
_PACKAGES = ("triton", "flash-attn", "flash-attn-4", "nvidia-cudnn-cu13", "nvidia-nccl-cu13", "numpy", "pytest")
_BUSY_PRODUCTS = 300  # about half a second, while clocks are read


def cases() -> Iterator[Case]:
    """Yield the cases of the stage."""
    yield Case("env", "card", _facts, 5, 60)
    yield Case("env", "matmul", _matmul, 5, 60)
    yield Case("env", "copy", _copy, 5, 60)


def smi() -> Line:
    """Return what `nvidia-smi` says of the first GPU; empty without it."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return {}
    done = None
    for query in (_QUERY, _LEAST):  # an older one does not know every name
        command = [path, f"--query-gpu={','.join(query)}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return dict(zip(query, (part.strip() for part in done.stdout.splitlines()[0].split(",")), strict=False))
    return {"error": (done.stderr or done.stdout).strip()[-200:] if done else ""}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _facts(context: Context) -> Line:
    found: Line = {
        "commit": os.environ.get("LONGREACH_COMMIT") or commit_id(), "build": build_id(), "machine": environment(),
        "torch": torch.__version__, "cuda": torch.version.cuda, "smi": smi(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }  # fmt: skip
    if context.device.type == "cuda":
        properties = torch.cuda.get_device_properties(context.device)
        found |= {
            "name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "free_bytes": torch.cuda.mem_get_info(context.device)[0],
            "l2_bytes": getattr(properties, "L2_cache_size", 0), "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    return found


def _matmul(context: Context) -> Line:
    """Time a bfloat16 product of random matrices, and read the clocks while the card is busy with it."""
    size = context.sizes.matmul
    left, right = context.random(size, size, seed=1), context.random(size, size, seed=2)
    out = torch.empty_like(left)
    found = context.time(lambda: torch.mm(left, right, out=out), 2.0 * size**3)
    for _ in range(1 if context.rehearsal else _BUSY_PRODUCTS):
        torch.mm(left, right, out=out)
    found["smi_while_busy"] = smi()
    context.synchronize()
    return found | {"what": f"bfloat16 product of random {size} x {size} matrices"}


def _copy(context: Context) -> Line:
    """Time a copy on the device; bytes read and bytes written both count."""
    size = context.sizes.copied
    source = torch.empty(size // 4, dtype=torch.int32, device=context.device).random_()
    target = torch.empty_like(source)
    found = context.time(lambda: target.copy_(source), moved=2.0 * size)
    return found | {"what": f"copy of {size} bytes, read and written"}
