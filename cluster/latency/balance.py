"""Layers of each stage by what they cost: measured, or of the hardware table.

The costs of a prefill count: a decode step passes through all stages one after the other, so it takes as long with
any split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.config.deployment import Deployment
from cluster.config.memory_budget import weight_bytes
from cluster.config.topology import balance, plan_shards
from cluster.latency.measured import Costs
from cluster.latency.model import counts_of
from cluster.latency.pipeline_work import prompt_steps, stage_works
from protos.stage.messages import Span

_NANO = 1e9
_LEAST_GAIN = 0.03  # of the slowest stage's time: for less no layer moves, as costs are not known better


@dataclass(frozen=True, slots=True)
class Split:
    """Layers of each stage, and the share of the slowest stage's time that they save."""

    layers: tuple[int, ...]
    gain: float


def split_stages(
    deployment: Deployment, context: int, table: Costs, measured: Costs | None = None
) -> tuple[Deployment, list[str]]:
    """Return the deployment with stages that take equal times for prompts of `context` tokens, and what to say of it.

    Layers that the YAML gives stay, and so does the split by weights unless the slowest stage gains 3 %. Costs are the
    measured ones where a split that changes with them takes nothing away, else the table's. What a split by measured
    costs would still gain is said.

    Args:
        table: costs of the hardware table.
        measured: of steps of this model on this hardware, if there are any.
    """
    notes: list[str] = []
    cluster = deployment.config.cluster
    if cluster.pipeline_parallel_size == 1:
        return deployment, notes
    if cluster.stage_layers is None:
        costs = measured if measured is not None and _may_change(deployment) else table
        better = better_split(deployment, context, costs)
        if better is not None and _has_room(deployment, better.layers):
            before = list(stage_layers(deployment))
            deployment = with_layers(deployment, better.layers)
            notes.append(
                f"stages have {list(better.layers)} layers: the slowest takes {better.gain:.0%} less time than with "
                f"{before}, the split by weights ({costs.source})"
            )
    best = measured or table
    if (better := better_split(deployment, context, best)) is not None:
        notes.append(
            f"the stages are uneven: cluster.stage_layers: {list(better.layers)} gives the slowest {better.gain:.0%} "
            f"less to do in a prefill ({best.source})"
        )
    return deployment, notes


def better_split(deployment: Deployment, context: int, costs: Costs) -> Split | None:
    """Return the layers of each stage with which the slowest one has least to do in a prefill of `context` tokens.

    The output head, which the last layer has with it, counts for the one row that is sampled. None: the split that the
    deployment has is as good, within 3 %.
    """
    layers = layer_seconds(deployment, context, costs)
    spans = balance([round(seconds * _NANO) for seconds in layers], deployment.config.cluster.pipeline_parallel_size)

    def slowest(parts: Sequence[Span]) -> float:
        return max(sum(layers[part.start : part.stop]) for part in parts)

    now = slowest([shard.layers for shard in deployment.shards if shard.rank == 0])
    gain = 1 - slowest(spans) / now if now else 0.0
    return Split(tuple(part.size for part in spans), gain) if gain >= _LEAST_GAIN else None


def layer_seconds(deployment: Deployment, context: int, costs: Costs) -> list[float]:
    """Return what each layer takes in a prefill of `context` tokens on its shard; the last has the output head."""
    spec = deployment.spec
    counts = counts_of(spec, prompt_steps(deployment, context), costs.keys)
    last = spec.num_hidden_layers - 1
    first = next(shard for shard in deployment.shards if shard.rank == 0)
    single = [
        replace(first, stage=1 if layer == last else 0, num_stages=2, layers=Span(layer, layer + 1))
        for layer in range(last + 1)
    ]
    works = stage_works(replace(deployment, shards=tuple(single)))
    return [float(np.sum(work.seconds(counts, costs.seconds))) for work in works]


def stage_layers(deployment: Deployment) -> tuple[int, ...]:
    """Return the number of layers of every stage."""
    return tuple(shard.layers.size for shard in deployment.shards if shard.rank == 0)


def with_layers(deployment: Deployment, layers: Sequence[int] | None) -> Deployment:
    """Return the deployment with so many layers in each stage; None: those of the YAML, else by weights."""
    cluster = deployment.config.cluster
    sizes = cluster.pipeline_parallel_size, cluster.expert_parallel_size
    shards = plan_shards(deployment.spec, *sizes, cluster.stage_layers if layers is None else layers)
    return replace(deployment, shards=shards)


def _may_change(deployment: Deployment) -> bool:
    """Return whether stages may get other layers at the next start, when more has been measured.

    On several nodes a stage would not find the stored KV of layers that were on another one's disk; and where only KV
    limits the context, which is as long as the stage with most layers affords, prompts might no longer fit.
    """
    return deployment.config.cluster.address == "local" and not deployment.limits_context


def _has_room(deployment: Deployment, layers: Sequence[int]) -> bool:
    """Return whether no shard gets more weights than one has now, where each has memory of its own.

    Weights are loaded before admission asks for room. On one host all shards share it, and admission decides.
    """
    cluster = deployment.config.cluster
    if cluster.device == "cpu" and cluster.address == "local":
        return True
    now, then = (
        max(weight_bytes(given, shard) for shard in given.shards)
        for given in (deployment, with_layers(deployment, layers))
    )
    return then <= now
