"""The work of a deployment's shards, what it usually costs, and what times measured on it are kept under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from cluster.config.deployment import Deployment
from cluster.config.memory_budget import DTYPE_BYTES, compute_dtype, kv_dtype, weight_widths
from cluster.config.topology import layer_cost, pair_cost
from cluster.latency.fit import Costs
from cluster.latency.hardware import load_hardware, processor
from cluster.latency.latency_file import Measured
from cluster.latency.stage_times import StageTimes
from cluster.latency.step_work import ShardWork
from cluster.scheduler.chunking import Chunk, DynamicChunks, chunks
from protos.node.environment import cpu_facts, cpu_name
from protos.stage.messages import ShardSpec, Span


def stage_works(deployment: Deployment) -> list[ShardWork]:
    """Return the work of every stage: that of its first shard, as the shards of a stage are alike."""
    return _works(deployment, [shard for shard in deployment.shards if shard.rank == 0])


def layer_works(deployment: Deployment) -> list[ShardWork]:
    """Return the work of every layer on its shard; the last has the output head."""
    first, last = deployment.shards[0], deployment.spec.num_hidden_layers - 1
    return _works(
        deployment,
        [
            replace(first, stage=int(layer == last), num_stages=2, layers=Span(layer, layer + 1))
            for layer in range(last + 1)
        ],
    )


def stage_times(deployment: Deployment, usual: Costs) -> StageTimes | None:
    """Return what learns how long layers of each kind take; None where all are of one kind, or in one stage."""
    is_moe = [deployment.spec.is_moe_layer(layer) for layer in range(deployment.spec.num_hidden_layers)]
    if len(set(is_moe)) == 1 or deployment.config.cluster.pipeline_parallel_size == 1:
        return None
    works = layer_works(deployment)
    moe = [sum(is_moe[slice(*shard.layers)]) for shard in deployment.shards if shard.rank == 0]
    sizes = [shard.layers.size for shard in deployment.shards if shard.rank == 0]
    layers = [(size - experts, experts) for size, experts in zip(sizes, moe, strict=True)]
    return StageTimes(works[is_moe.index(False)], works[is_moe.index(True)], layers, usual)


def _works(deployment: Deployment, shards: Sequence[ShardSpec]) -> list[ShardWork]:
    spec, width = deployment.spec, DTYPE_BYTES[compute_dtype(deployment)]
    kv_type = kv_dtype(deployment)
    has_scales = kv_type in ("int8", "fp8")  # one in float32 for every head
    kv_width = 1.0 + 4.0 / spec.head_dim if has_scales else float(DTYPE_BYTES[kv_type])
    widths = weight_widths(deployment)
    return [ShardWork(spec, shard, width, kv_width, widths) for shard in shards]


def dynamic_chunks(deployment: Deployment) -> DynamicChunks | None:
    """Return the limits of dense steps of a pipeline; None: it has one stage, or `prefill.dynamic_chunks` is off."""
    config, spec = deployment.config, deployment.spec
    stages, prefill = config.cluster.pipeline_parallel_size, config.prefill
    if stages == 1 or not prefill.dynamic_chunks:
        return None
    layers = range(spec.num_hidden_layers)
    row = sum(layer_cost(spec, layer) for layer in layers)
    return DynamicChunks(stages, prefill.max_num_batched_tokens, row, pair_cost(spec) * len(layers))


def prompt_steps(deployment: Deployment, context: int) -> list[Chunk]:
    """Return the steps of a prompt of `context` tokens that is alone."""
    budget, dynamic = deployment.config.prefill.max_num_batched_tokens, dynamic_chunks(deployment)
    return list(chunks(deployment.spec, 0, context, context, budget, dynamic))


def usual_costs(deployment: Deployment, cores: int) -> Costs:
    """Return what the hardware table says of a unit of work on one shard; of GPUs, whose ratios are alike, any will do.

    Args:
        cores: of this machine, for stages on the processor.
    """
    cluster, table = deployment.config.cluster, load_hardware()
    if cluster.device != "cpu":
        return next(row for row in table.values() if row.kind == "gpu").costs()
    flags = (cpu_facts() or {}).get("flags", "").split()
    return processor(table, flags).costs(cluster.threads(cores), cluster.num_actors)


def measured_on(deployment: Deployment, kernel_family: str, cores: int) -> Measured:
    """Return the hardware and the model of a deployment on this machine.

    Args:
        kernel_family: of its shards; empty: of a processor.
        cores: of this machine, for stages on the processor.
    """
    cluster = deployment.config.cluster
    is_cpu = cluster.device == "cpu"
    hardware = cpu_name() if is_cpu else f"{kernel_family} at {cpu_name()}"
    threads = cluster.threads(cores)
    spec = deployment.spec
    sparse = "" if spec.sparse is None else _digest(json.dumps(asdict(spec.sparse)))
    return Measured(
        hardware, cores, threads if is_cpu else 1, cluster.pipeline_parallel_size, cluster.expert_parallel_size,
        _digest(replace(spec, sparse=None).to_json()), sparse, compute_dtype(deployment), kv_dtype(deployment),
    )  # fmt: skip


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
