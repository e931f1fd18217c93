"""What `longreach plan` is asked, checked and answered."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.deployment import Deployment
from cluster.latency.hardware import Device, load_hardware
from cluster.planner.plan import make_plan
from cluster.planner.subject import load_subject
from cluster.planner.target import Target, cpu_target, gpu_target, have_target
from protos.errors import UserError

_MOST_TOKENS = 1 << 24
_LEAST_CHUNK = 16


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """The options of the verb, as they were given."""

    config: Path
    context: int | None = None
    gpu: str | None = None
    have: str | None = None
    cpu: str | None = None
    cores: int | None = None
    layout: str | None = None
    kv: str = "auto"
    chunk: int | None = None
    hardware: Path | None = None


def plan_for(request: PlanRequest) -> dict[str, Any]:
    """Return the plan. Raises UserError: options that do not go together, or a configuration that cannot be used."""
    table = load_hardware(request.hardware)
    named = {"--gpu": request.gpu, "--have": request.have, "--cpu": request.cpu}
    chosen = [name for name, value in named.items() if value is not None]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)}: give one of them")
    if request.cores is not None and (request.gpu or request.have):
        raise UserError("--cores: is for --cpu, or for this machine")
    is_gpu = request.gpu is not None or request.have is not None
    device = "cuda" if is_gpu else "cpu" if request.cpu is not None else None
    deployment = load_subject(request.config, device, request.kv, request.chunk)
    if device is None and deployment.config.cluster.device == "cuda":
        raise UserError(f"{request.config}: is for GPUs: name them with --gpu or --have, or say --cpu SIZE")
    context = request.context if request.context is not None else deployment.max_model_len
    if not 1 <= context <= _MOST_TOKENS:
        raise UserError(f"--context: {context}: must be from 1 to {_MOST_TOKENS} tokens")
    if request.chunk is not None and request.chunk < _LEAST_CHUNK:
        raise UserError(f"--chunk: {request.chunk}: must be at least {_LEAST_CHUNK} tokens")
    target = _target(request, table, deployment.config.data_dir)
    return make_plan(deployment, context, target, _layout(request, deployment, target))


def _target(request: PlanRequest, table: Mapping[str, Device], data_dir: Path) -> Target:
    if request.gpu is not None:
        return gpu_target(table, request.gpu)
    if request.have is not None:
        return have_target(table, request.have)
    return cpu_target(table, request.cpu, request.cores, data_dir)


def _layout(request: PlanRequest, deployment: Deployment, target: Target) -> tuple[int, int] | None:
    """Return the split that was asked for: by the option, else by a YAML for the same kind of hardware."""
    if request.layout is not None:
        match = re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", request.layout.strip())
        if match is None:
            raise UserError(f"--layout: {request.layout!r}: must be STAGESxSHARDS such as 2x1")
        return int(match[1]), int(match[2])
    if target.kind == "cpu" and deployment.config.cluster.num_actors > 1:
        return deployment.config.cluster.pipeline_parallel_size, deployment.config.cluster.expert_parallel_size
    return None
