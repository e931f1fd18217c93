"""The hardware that a plan is for: how much memory, how many devices, and what a unit of work costs there."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from cluster.common.units import parse_bytes
from cluster.config.deployment import Deployment
from cluster.latency.balance import split_stages
from cluster.latency.hardware import Device, find_device, processor
from cluster.latency.measured import Costs, Measurements
from protos.errors import UserError
from protos.node.environment import cpu_facts, usable_cores

_MOST = 64  # devices that are tried where their number is free
_HOP_S = 0.001  # assumed: between stages of one node, and of the head process between steps
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
    measurements: Measurements | None = None  # of this machine; go before the table

    @property
    def has_rates(self) -> bool:
        """Whether times can be predicted."""
        return self.device is not None

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
        table = self._table_costs(deployment)
        if (measured := self._measured_costs(deployment, table)) is not None:
            return measured
        why = "" if self.measurements is None else " (no steps of this model were measured here)"
        return replace(table, source=table.source + why)

    def split(self, deployment: Deployment, context: int) -> tuple[Deployment, list[str]]:
        """Return the deployment with its stages as a launch balances them here, and what there is to say of them."""
        if not self.has_rates:
            return deployment, []
        table = self._table_costs(deployment)
        known = self.measurements
        measured = known.layer_costs_of(deployment, table.seconds) if known is not None else None
        return split_stages(deployment, context, table, measured)

    def _table_costs(self, deployment: Deployment) -> Costs:
        assert self.device is not None
        cluster, name, seconds = deployment.config.cluster, self.device.name, self.device.costs()
        if self.kind == "cpu":
            threads = cluster.threads(self.cores)
            name, seconds = f"{threads} x {name}", self.device.costs(threads, cluster.num_actors)
        is_rough = not self.device.measured
        return Costs(seconds, f"hardware table: {name}", 1 / self.device.link, _HOP_S, is_rough=is_rough)

    def _measured_costs(self, deployment: Deployment, table: Costs) -> Costs | None:
        if self.measurements is None or (found := self.measurements.costs_of(deployment, table.seconds)) is None:
            return None
        return replace(found, link_s=table.link_s, hop_s=table.hop_s)

    def with_measurements(self, measurements: Measurements) -> Target:
        """Return the target with times that were measured on it."""
        return replace(self, measurements=measurements)

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


def cpu_target(
    table: Mapping[str, Device], text: str | None = None, cores: int | None = None, data_dir: Path | None = None
) -> Target:
    """Return this machine's processor with so much memory (None: what is available now). Raises UserError.

    Args:
        data_dir: where running heads keep the times that they measure.
    """
    memory = psutil.virtual_memory().available if text is None else parse_bytes(text)
    flags = (cpu_facts() or {}).get("flags", "").split()
    device = processor(table, flags)
    cores = cores or usable_cores()
    return Target(
        "cpu",
        f"{cores} x {device.name}",
        memory,
        1,
        device,
        cores,
        Measurements.of(data_dir, cores) if data_dir else None,
    )


def _counted(text: str) -> tuple[int | None, str]:
    match = _COUNTED.fullmatch(text.strip())
    if match is None:
        return None, text.strip()
    if not int(match[1]):
        raise UserError(f"{text!r}: the number of devices must be at least 1")
    return int(match[1]), match[2]
