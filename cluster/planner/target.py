"""The hardware that a plan is for: how much memory, how many devices, and what a unit of work costs there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from cluster.common.units import parse_bytes
from cluster.config.deployment import Deployment
from cluster.planner.forecast import Costs
from cluster.planner.hardware import Device, find_device, processor
from protos.errors import UserError
from protos.node.environment import cpu_facts, usable_cores

_MOST = 64  # devices that are tried where their number is free
_HOP_S = 0.002  # assumed: between stages of one node, and of the head process between steps
_COUNTED = re.compile(r"([0-9]{1,4})\s*[x*]\s*(.+)")


@dataclass(frozen=True, slots=True)
class Target:
    """Hardware of a plan. `memory` is of one device, or of the host; `devices` None: as many as are needed."""

    kind: str  # cuda or cpu
    name: str
    memory: int
    devices: int | None
    device: Device | None = None  # None: its speed is unknown
    cores: int = 0
    measured_costs: Costs | None = None  # go before those of the table

    @property
    def has_rates(self) -> bool:
        """Whether times can be predicted."""
        return self.device is not None or self.measured_costs is not None

    @property
    def measured(self) -> bool:
        """Whether predicted times come from measured steps or rates."""
        return self.measured_costs is not None or (self.device is not None and self.device.measured)

    def counts(self) -> Iterator[int]:
        """Yield the numbers of shards to try, the least first."""
        if self.kind == "cpu":
            yield 1
        elif self.devices is not None:
            yield self.devices
        else:
            number = 1
            while number <= _MOST:
                yield number
                number *= 2

    def costs_of(self, deployment: Deployment) -> Costs:
        """Return what a unit of work costs on one shard of a deployment here; `has_rates` must be true."""
        if self.measured_costs is not None:
            return self.measured_costs
        assert self.device is not None
        if self.kind == "cuda":
            return Costs(self.device.costs(), f"hardware table: {self.device.name}", 1 / self.device.link, _HOP_S)
        shards = deployment.config.cluster.num_actors
        threads = deployment.config.cluster.threads(self.cores)
        source = f"hardware table: {threads} x {self.device.name}"
        return Costs(self.device.costs(threads, shards), source, 1 / self.device.link, _HOP_S)

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "name": self.name, "memory_bytes": self.memory, "devices": self.devices,
            "cores": self.cores or None,
        }  # fmt: skip


def gpu_target(table: Mapping[str, Device], text: str) -> Target:
    """Return the target of `h200` or `4xh200`. Raises UserError."""
    count, key = _counted(text)
    device = find_device(table, key)
    return Target("cuda", device.name, device.usable, count, device)


def have_target(table: Mapping[str, Device], text: str) -> Target:
    """Return the target of `2x24GB`: GPUs of unknown speed; the driver takes its part. Raises UserError."""
    count, size = _counted(text)
    try:
        memory = parse_bytes(size)
    except UserError as error:
        raise UserError(f"have: {text!r}: must be COUNTxSIZE such as 2x24GB ({error})") from error
    reserved = min((row.reserved for row in table.values() if row.kind == "gpu"), default=0)
    return Target("cuda", f"GPU of {size}", max(0, memory - reserved), count or 1)


def cpu_target(table: Mapping[str, Device], text: str | None = None, cores: int | None = None) -> Target:
    """Return this machine's processor with so much memory (None: what is available now). Raises UserError."""
    memory = psutil.virtual_memory().available if text is None else parse_bytes(text)
    flags = (cpu_facts() or {}).get("flags", "").split()
    device = processor(table, flags)
    cores = cores or usable_cores()
    return Target("cpu", f"{cores} x {device.name}", memory, 1, device, cores)


def _counted(text: str) -> tuple[int | None, str]:
    match = _COUNTED.fullmatch(text.strip())
    if match is None:
        return None, text.strip()
    if not int(match[1]):
        raise UserError(f"{text!r}: the number of devices must be at least 1")
    return int(match[1]), match[2]
