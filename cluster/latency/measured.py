"""What units of work cost, for plans and the split of stages: as running heads have measured it on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.config.deployment import Deployment
from cluster.latency.latency_file import Measured, measured_files
from cluster.latency.model import LatencyModel
from cluster.latency.pipeline_work import measured_on, stage_times
from cluster.latency.stage_times import PARTS
from protos.model.spec import ModelSpec

Floats = NDArray[np.float64]
KeysOf = Callable[[Floats], Floats]  # keys that sparse rows visit, by their mean context
_BY_THREADS = (False, True, True, True, True, True, False)  # of UNITS: fewer threads of a shard take longer for it


@dataclass(frozen=True, slots=True)
class Costs:
    """What a forecast stands on: seconds of each unit of `step_work.UNITS`, and where they come from."""

    seconds: tuple[float, ...]
    source: str
    link_s: float = 0.0  # of one byte to the next stage
    hop_s: float = 0.0  # of a message to the next stage, and of what the head does between steps
    keys: KeysOf | None = None  # measured; None: what the budgets say
    is_rough: bool = False  # they are assumed, not measured
    parts: tuple[float, ...] = (1.0,) * len(PARTS)  # what layers take over what `seconds` say


@dataclass(frozen=True)
class Measurements:
    """What a data directory keeps of times measured on this kind of hardware."""

    files: Sequence[tuple[Measured, Mapping[str, Any]]]
    cores: int

    @classmethod
    def of(cls, data_dir: Path, cores: int) -> Measurements:
        """Read a data directory; one without measured steps has none."""
        return cls(list(measured_files(data_dir)), cores)

    def costs_of(self, deployment: Deployment, usual: Sequence[float]) -> Costs | None:
        """Return the costs of a deployment, None where this model was not measured on such hardware.

        Steps of the same model in this layout and with these threads are taken if there are any, else in another
        layout, else with another type of KV; costs are scaled to the threads. What the steps do not tell follows from
        the ratios of `usual`, the costs that the hardware table has for this deployment. Steps of other models do not
        count: what a step costs beside its work is most of one of a small model, and would be scaled up with the work.
        """
        wanted = measured_on(deployment, "", self.cores)
        here = [(of, learned) for of, learned in self.files if (of.hardware, of.cores) == (wanted.hardware, self.cores)]
        model = [entry for entry in here if (entry[0].model, entry[0].dtype) == (wanted.model, wanted.dtype)]
        like = [entry for entry in model if entry[0].kv_dtype == wanted.kv_dtype]
        same = [entry for entry in like if _layout(entry[0]) == _layout(wanted)]
        layout = f"{wanted.stages} x {wanted.shards}"
        for group, name in ((same, layout), (like, "other layouts"), (model, "other types of KV")):
            if not group:
                continue
            threads = max(of.threads for of, _ in group)
            if fitted := _fit(group, wanted, deployment.spec, _scaled(usual, wanted.threads / threads)):
                model_fit, steps = fitted
                seconds = _scaled(model_fit.coefficients, threads / wanted.threads)
                has_cells = any(of.sparse == wanted.sparse and wanted.sparse for of, _ in group)
                keys = model_fit.keys if has_cells else None
                return Costs(seconds, f"{steps:,} steps measured here (this model, {name})", keys=keys)
        return None

    def layer_costs_of(self, deployment: Deployment, usual: Sequence[float]) -> Costs | None:
        """Return usual costs with what layers took beside them in this deployment here, on a processor.

        None where it was not measured, or all layers are of one kind: then stages are alike with any costs.
        """
        wanted, costs = measured_on(deployment, "", self.cores), tuple(usual)
        learned = next((learned for of, learned in self.files if of == wanted), None)
        if learned is None or (stages := stage_times(deployment, costs)) is None:
            return None
        model = LatencyModel(deployment.spec, stages=stages)
        try:
            model.restore(learned)
        except ValueError:
            return None
        if not stages.num_steps:
            return None
        return Costs(costs, f"{stages.num_steps:,} times of stages measured here", keys=model.keys, parts=stages.scales)


def _scaled(costs: Sequence[float], scale: float) -> tuple[float, ...]:
    """Return costs of shards with other threads: `scale` is how much longer they compute."""
    return tuple(cost * scale if by else cost for cost, by in zip(costs, _BY_THREADS, strict=True))


def _fit(
    group: Sequence[tuple[Measured, Mapping[str, Any]]], wanted: Measured, spec: ModelSpec, usual: tuple[float, ...]
) -> tuple[LatencyModel, int] | None:  # fmt: skip
    """Return the model of all steps of a group with the same threads, sparse cells as wanted; None without steps."""
    threads = max(of.threads for of, _ in group)
    usable = [(of, learned) for of, learned in group if of.threads == threads]
    usable.sort(key=lambda entry: entry[0].sparse != wanted.sparse)
    model = LatencyModel(spec, usual=usual)
    for index, (_, learned) in enumerate(usable):
        try:
            model.absorb(learned) if index else model.restore(learned)
        except ValueError:
            continue
    return (model, model.num_steps) if model.num_steps else None


def _layout(of: Measured) -> tuple[int, int, int]:
    return of.threads, of.stages, of.shards
