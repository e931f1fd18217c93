"""Print what PyTorch can do on this machine as one JSON object, or what the compiled kernels: `python -m workers.doctor
[kernels]`.

A process of its own, so that the head never loads torch and a broken installation is a finding, not a crash.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from protos.node.environment import version_of
from workers.attention.cuda import compute_family
from workers.kernels.build import best_path, kernel_family, load
from workers.kernels.triton import PROVEN_ON


def torch_facts() -> dict[str, Any]:
    """Return versions, threads, CPU features as torch sees them, CUDA devices and communication libraries."""
    nccl = dist.is_available() and dist.is_nccl_available()
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "mkldnn_bf16": _ask(torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
        "amx": _ask(torch.cpu, "_is_amx_tile_supported"),
        "avx512_bf16": _ask(torch.cpu, "_is_avx512_bf16_supported"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda_build": torch.version.cuda,
        "gloo": dist.is_available() and dist.is_gloo_available(),
        "nccl": nccl,
        "nccl_version": _nccl_version() if nccl else None,
        "triton": version_of("triton"),
        "devices": [_device_facts(index) for index in range(torch.cuda.device_count())],
    }


def _device_facts(index: int) -> dict[str, Any]:
    """Return what a GPU is; `kernels` names those that compute attention there, for bfloat16 and heads of 128.

    `is_proven`: the tests of tests/gpu have passed on a GPU of its compute capability.
    """
    properties = torch.cuda.get_device_properties(index)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "name": properties.name,
        "capability": capability,
        "is_proven": capability in PROVEN_ON,
        "memory_bytes": properties.total_memory,
        "kernels": _kernels(torch.device("cuda", index)),
    }


def _kernels(device: torch.device) -> str:
    """Return the `compute_family` of a GPU, which tries a library there; why not, where the GPU takes nothing."""
    try:
        return compute_family(device, torch.bfloat16, 128)
    except RuntimeError as error:  # it is full, or another process has it for itself
        return f"unknown: {str(error).splitlines()[0]}"


def _nccl_version() -> str:
    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def kernel_facts() -> dict[str, Any]:
    """Return the instruction set that the kernels compute with on this machine's CPU; built now if need be.

    `path` is null where there is no library: `reason` says why, and `family` names PyTorch's implementation.
    """
    path = best_path()
    return {
        "path": None if path is None else path.name.lower(),
        "family": kernel_family(torch.device("cpu")),
        "reason": load().reason,
    }


def _ask(module: Any, name: str) -> bool | None:
    """Call a private predicate of torch; None where this version does not have it."""
    query = getattr(module, name, None)
    return None if query is None else bool(query())


if __name__ == "__main__":
    json.dump(kernel_facts() if sys.argv[1:] == ["kernels"] else torch_facts(), sys.stdout)
    sys.stdout.write("\n")
