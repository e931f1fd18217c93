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
from cluster.latency.pipeline_work import layer_works, prompt_steps
from cluster.latency.stage_times import layer_parts
from protos.stage.messages import Span

_NANO = 1e9
# share of the slowest stage's time for which layers move: costs are not known better, and measured ones scatter
_LEAST_GAIN, _LEAST_MEASURED = 0.03, 0.05


@dataclass(frozen=True, slots=True)
class Split:
    """Layers of each stage, and the share of the slowest stage's time that they save."""

    layers: tuple[int, ...]
    gain: float


def split_stages(
    deployment: Deployment, context: int, table: Costs, measured: Costs | None = None
) -> tuple[Deployment, list[str]]:
    """Return the deployment with stages that take equal times for prompts of `context` tokens, and what to say of it.

    Layers that the YAML gives stay. Others move from the split by weights to that by the table's costs where the
    slowest stage gains 3 %, and from there to that by measured ones where it gains 5 %, if a split that changes with
    what is measured takes nothing away. What is not done but would gain as much is said.

    Args:
        table: costs of the hardware table.
        measured: the table's with what layers of each kind took beside them in this deployment here, if that is known.
    """
    notes: list[str] = []
    cluster = deployment.config.cluster
    if cluster.pipeline_parallel_size == 1:
        return deployment, notes
    known = [(table, _LEAST_GAIN)] if measured is None else [(table, _LEAST_GAIN), (measured, _LEAST_MEASURED)]
    if cluster.stage_layers is None:
        deployment = with_layers(deployment, None)
        for costs, least in known if _may_change(deployment) else known[:1]:
            better = better_split(deployment, context, costs, least)
            if better is not None and _has_room(deployment, better.layers):
                change = f"less time than with {list(stage_layers(deployment))} ({costs.source})"
                notes = [f"stages have {list(better.layers)} layers: the slowest takes {better.gain:.0%} {change}"]
                deployment = with_layers(deployment, better.layers)
    costs, least = known[-1]
    if (better := better_split(deployment, context, costs, least)) is not None:
        notes.append(
            f"the stages are uneven: cluster.stage_layers: {list(better.layers)} gives the slowest {better.gain:.0%} "
            f"less to do in a prefill ({costs.source})"
        )
    return deployment, notes


def better_split(deployment: Deployment, context: int, costs: Costs, least: float = _LEAST_GAIN) -> Split | None:
    """Return the layers of each stage with which the slowest one has least to do in a prefill of `context` tokens.

    The output head, which the last layer has with it, counts for the one row that is sampled. None: the split that the
    deployment has is as good, but for a share of less than `least`.
    """
    layers = layer_seconds(deployment, context, costs)
    spans = balance([round(seconds * _NANO) for seconds in layers], deployment.config.cluster.pipeline_parallel_size)

    def slowest(parts: Sequence[Span]) -> float:
        return max(sum(layers[part.start : part.stop]) for part in parts)

    now = slowest([shard.layers for shard in deployment.shards if shard.rank == 0])
    gain = 1 - slowest(spans) / now if now else 0.0
    return Split(tuple(part.size for part in spans), gain) if gain >= least else None


def layer_seconds(deployment: Deployment, context: int, costs: Costs) -> list[float]:
    """Return what each layer takes in a prefill of `context` tokens on its shard; the last has the output head."""
    spec, (dense, experts, of_attention) = deployment.spec, costs.parts
    counts = counts_of(spec, prompt_steps(deployment, context), costs.keys)
    seconds = []
    for layer, work in enumerate(layer_works(deployment)):
        rest, attention = layer_parts(work, counts, costs.seconds)
        of_layer = experts if spec.is_moe_layer(layer) else dense
        seconds.append(float(np.sum(of_layer * rest + of_attention * attention)))
    return seconds


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
