"""`longreach plan`: whether a model with a context fits on hardware, how it is laid out best, and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster.config.deployment import Deployment
from cluster.config.memory_budget import compute_dtype, kv_dtype, shard_kv_token_bytes
from cluster.config.topology import LayoutError, shard_weight_bytes
from cluster.latency.balance import stage_layers
from cluster.latency.measured import Costs
from cluster.planner.forecast import Forecast, predict
from cluster.planner.memory import account, longest_context, precision_table, refusal, relayout
from cluster.planner.subject import as_dense, as_sparse
from cluster.planner.target import Target


@dataclass(frozen=True, slots=True)
class Layout:
    """One split that was tried: the deployment, why admission refuses it (""), and its times if they are known."""

    deployment: Deployment
    refused: str
    dense: Forecast | None
    sparse: Forecast | None
    notes: tuple[str, ...]  # of the layers of its stages

    @property
    def size(self) -> tuple[int, int]:
        cluster = self.deployment.config.cluster
        return cluster.pipeline_parallel_size, cluster.expert_parallel_size


def make_plan(
    deployment: Deployment, context: int, target: Target, layout: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Return the plan as plain data; docs/planning.md explains every key.

    Args:
        layout: stages and shards; None: the best one that fits, else the largest.

    Raises:
        LayoutError: the model cannot be split like that.
    """
    chosen = _tried(deployment, context, target, *layout) if layout else recommend(deployment, context, target)
    given, spec = chosen.deployment, deployment.spec
    stages, shards = chosen.size
    whole = relayout(deployment, 1, 1)
    memory = account(given, context)
    notes = []
    if context > spec.max_context:
        notes.append(
            f"the positions cover {spec.max_context:,} tokens: longer contexts need YaRN, or the model's long-context "
            "file (such as config_1m.json)"
        )
    costs = target.costs_of(given) if chosen.dense else None
    if costs is not None and costs.is_rough:
        notes.append("times come from assumed shares of data-sheet rates: expect them to be off by a factor of two")
    notes += chosen.notes
    return {
        "model": {
            "type": spec.model_type,
            "parameters": shard_weight_bytes(spec, whole.shards[0], 1),
            "active_parameters": _active(whole),
            "layers": spec.num_hidden_layers,
            "dtype": compute_dtype(deployment),
            "kv_dtype": kv_dtype(deployment),
            "kv_bytes_per_token": shard_kv_token_bytes(whole, whole.shards[0]),
            "max_context": spec.max_context,
        },
        "context": context,
        "hardware": target.to_json(),
        "layout": {
            "stages": stages, "shards": shards, "devices": stages * shards if target.kind == "cuda" else 1,
            "chunk": given.config.prefill.max_num_batched_tokens,
        },
        "memory": {
            "shards": [shard.to_json() for shard in memory],
            "largest_bytes": max(shard.total_bytes for shard in memory),
            "total_bytes": sum(shard.total_bytes for shard in memory),
        },
        "fits": not chosen.refused,
        "why_not": chosen.refused,
        "longest_context": longest_context(given, target.memory),
        "prefill_s": {
            "dense": chosen.dense and chosen.dense.prefill_s, "sparse": chosen.sparse and chosen.sparse.prefill_s
        },
        "decode_s": chosen.dense and chosen.dense.decode_s,
        "times_from": costs and costs.source,
        "precisions": precision_table(deployment),
        "notes": notes,
    }  # fmt: skip


def recommend(deployment: Deployment, context: int, target: Target) -> Layout:
    """Return the layout to use: of those that fit the fastest prefill, or where times are unknown the most stages.

    Where the number of devices is free, only as many as are needed. Stages come before shards, since only activations
    cross between them, while shards meet twice a layer. On one host all cores serve one process, so it stays whole.
    """
    last: Layout | None = None
    for number in target.counts():
        tried = [_tried(deployment, context, target, *size) for size in _sizes(deployment, number)]
        fitting = [layout for layout in tried if not layout.refused]
        if fitting:
            return min(fitting, key=_rank)
        last = tried[0] if tried else last
    return last or _tried(deployment, context, target, 1, 1)


def _rank(layout: Layout) -> tuple[float, int]:
    best = layout.sparse or layout.dense
    return (best.prefill_s if best else 0.0, layout.size[1])


def _sizes(deployment: Deployment, devices: int) -> Iterator[tuple[int, int]]:
    """Yield the splits over exactly so many devices that the model allows, most stages first."""
    for shards in range(1, devices + 1):
        if devices % shards == 0:
            try:
                relayout(deployment, devices // shards, shards)
            except LayoutError:
                continue
            yield devices // shards, shards


def _tried(deployment: Deployment, context: int, target: Target, stages: int, shards: int) -> Layout:
    plain = relayout(deployment, stages, shards)
    given, notes = target.split(plain, context)
    refused = refusal(given, context, target.memory)
    if refused and not refusal(plain, context, target.memory):
        notes = [f"stages of {list(stage_layers(given))} layers would take more equal times, but do not fit"]
        given, refused = plain, ""
    costs: Costs | None = target.costs_of(given) if target.has_rates else None
    dense = predict(as_dense(given), context, costs) if costs else None
    sparse = predict(as_sparse(given), context, costs) if costs else None
    return Layout(given, refused, dense, sparse, tuple(notes))


def _active(whole: Deployment) -> int:
    """Return the parameters that one token meets, tables included."""
    spec = whole.spec
    unused = spec.num_experts - spec.num_experts_per_tok
    moe = sum(spec.is_moe_layer(layer) for layer in range(spec.num_hidden_layers))
    expert = 3 * spec.hidden_size * spec.moe_intermediate_size
    return shard_weight_bytes(spec, whole.shards[0], 1) - moe * unused * expert
