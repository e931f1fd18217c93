"""Layers of each stage by what they cost: measured, or of the hardware table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cluster.config.deployment import Deployment
from cluster.config.topology import balance
from cluster.latency.measured import Costs
from cluster.latency.model import counts_of
from cluster.latency.pipeline_work import stage_works
from cluster.scheduler.chunking import chunks
from protos.stage.messages import Span

_NANO = 1e9
_LEAST_GAIN = 0.01  # of the slowest stage, for which it is worth a word


def balanced_layers(deployment: Deployment, context: int, costs: Costs) -> list[int] | None:
    """Return the layers of each stage with which the slowest one has least to do in a prefill of `context` tokens.

    The output head, which the last layer has with it, counts for the one row that is sampled. None: the split that the
    deployment has is as good, within a percent.
    """
    layers = layer_seconds(deployment, context, costs)
    spans = balance([round(seconds * _NANO) for seconds in layers], deployment.config.cluster.pipeline_parallel_size)

    def slowest(parts: list[Span]) -> float:
        return max(sum(layers[part.start : part.stop]) for part in parts)

    now = [shard.layers for shard in deployment.shards if shard.rank == 0]
    return [part.size for part in spans] if slowest(spans) < (1 - _LEAST_GAIN) * slowest(now) else None


def layer_seconds(deployment: Deployment, context: int, costs: Costs) -> list[float]:
    """Return what each layer takes in a prefill of `context` tokens on its shard; the last has the output head."""
    spec = deployment.spec
    steps = list(chunks(spec, 0, context, context, deployment.config.prefill.max_num_batched_tokens))
    counts = counts_of(spec, steps, costs.keys)
    last = spec.num_hidden_layers - 1
    first = next(shard for shard in deployment.shards if shard.rank == 0)
    single = [
        replace(first, stage=1 if layer == last else 0, num_stages=2, layers=Span(layer, layer + 1))
        for layer in range(last + 1)
    ]
    works = stage_works(replace(deployment, shards=tuple(single)))
    return [float(np.sum(work.seconds(counts, costs.seconds))) for work in works]
