"""The memory account of a deployment: what each shard holds, by the functions that admission uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.common.errors import PreflightError
from cluster.common.units import format_bytes
from cluster.config.deployment import Deployment
from cluster.config.memory_budget import (
    DTYPE_BYTES,
    compute_dtype,
    shard_kv_token_bytes,
    shard_scratch_bytes,
    weight_bytes,
)
from cluster.config.topology import plan_shards, product_params, shard_weight_bytes
from cluster.stages.preflight import count_pages
from protos.model.spec import ModelSpec
from protos.stage.messages import LoadProgress

CONTEXTS = (1 << 10, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20)  # tokens, of the table
_GROUP = 128  # weights that share a scale of two bytes where they have four bits
PRECISIONS = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5 + 2 / _GROUP}  # bytes of a weight in a product
_PROCESS = 100 << 20  # Python, its libraries and arenas, beyond the fixed part of scratch; docs/planning.md
_LONGEST = 1 << 24  # tokens; searches end there


@dataclass(frozen=True, slots=True)
class ShardMemory:
    """What one shard holds, in bytes, for one context.

    `scratch_bytes` is an upper estimate of the largest step; `process_bytes` are of a process on a host: admission
    finds them used already; a GPU's row of the hardware table reserves them.
    """

    stage: int
    rank: int
    layers: int
    parameters: int
    weight_bytes: int
    kv_bytes: int
    scratch_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.scratch_bytes + self.process_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total_bytes": self.total_bytes}


def account(deployment: Deployment, context: int, sequences: int = 1) -> list[ShardMemory]:
    """Return the memory of every shard while `sequences` contexts of so many tokens are in KV."""
    page = deployment.config.kv_cache.page_size
    tokens = sequences * -(-context // page) * page
    given = replace(deployment, max_model_len=context)
    return [
        ShardMemory(
            shard.stage, shard.rank, shard.layers.size, shard_weight_bytes(deployment.spec, shard, 1),
            weight_bytes(deployment, shard), tokens * shard_kv_token_bytes(deployment, shard),
            shard_scratch_bytes(given, shard), _process_bytes(deployment),
        )
        for shard in deployment.shards
    ]  # fmt: skip


def relayout(deployment: Deployment, stages: int, shards: int) -> Deployment:
    """Return the deployment split over other stages and shards. Raises LayoutError.

    With as many stages as before, they keep the layers that the YAML gives them.
    """
    before = deployment.config.cluster
    layers = before.stage_layers if before.pipeline_parallel_size == stages else None
    cluster = before.model_copy(
        update={"pipeline_parallel_size": stages, "expert_parallel_size": shards, "stage_layers": layers}
    )
    config = deployment.config.model_copy(update={"cluster": cluster})
    return replace(deployment, config=config, shards=plan_shards(deployment.spec, stages, shards, layers))


def refusal(deployment: Deployment, context: int, memory: int) -> str:
    """Return why admission would refuse a deployment with contexts of so many tokens, or "".

    Args:
        memory: bytes for weights, KV and scratch, of each shard or, where all of them share it (cpu), of the machine.
    """
    sharers = _sharers(deployment)
    weights = [weight_bytes(deployment, shard) for shard in deployment.shards]
    memory = max(0, memory - sharers * _process_bytes(deployment))
    if (missing := (max(weights) if sharers == 1 else sum(weights)) - memory) > 0:
        return f"the weights alone need {format_bytes(missing)} more"
    model = deployment.config.model.model_copy(update={"max_model_len": context})
    asked = replace(deployment, config=deployment.config.model_copy(update={"model": model}), max_model_len=context)
    try:
        count_pages(asked, _loaded(weights, memory, sharers), sharers)
    except PreflightError as error:
        return str(error)
    return ""


def longest_context(deployment: Deployment, memory: int) -> int:
    """Return the longest context, in tokens, that admission accepts in so much memory (as of `refusal`); 0: none."""
    page = deployment.config.kv_cache.page_size
    low, high = 0, _LONGEST // page  # pages: the first fits or is none, the last does not fit or is the limit
    if not refusal(deployment, high * page, memory):
        return high * page
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refusal(deployment, middle * page, memory) else (middle, high)
    return low * page


def precision_bytes(spec: ModelSpec, precision: str) -> int:
    """Return the bytes of all weights where those of products have another precision.

    The embedding table, norms, routers and biases stay in bfloat16, as published quantized checkpoints keep them; so
    does the output head. `int4` has a scale of two bytes for every 128 weights.
    """
    shard = plan_shards(spec, 1, 1)[0]
    total = shard_weight_bytes(spec, shard, 1)
    products = product_params(spec, shard)
    return round(products * PRECISIONS[precision] + (total - products) * PRECISIONS["bf16"])


def precision_table(deployment: Deployment, contexts: Sequence[int] = CONTEXTS) -> list[dict[str, Any]]:
    """Return a row for each precision of the weights: their bytes, and with the KV of one context of each length.

    KV has the type of the deployment; scratch is left out, as published tables do.
    """
    whole = relayout(deployment, 1, 1)
    token = shard_kv_token_bytes(whole, whole.shards[0])
    rows = []
    for precision in PRECISIONS:
        weights = precision_bytes(deployment.spec, precision)
        totals = {context: weights + context * token for context in contexts}
        rows.append({"precision": precision, "weight_bytes": weights, "totals": totals})
    return rows


def activation_width(deployment: Deployment) -> int:
    """Return the bytes of a weight and of an activation."""
    return DTYPE_BYTES[compute_dtype(deployment)]


def _process_bytes(deployment: Deployment) -> int:
    return 0 if deployment.config.cluster.device == "cuda" else _PROCESS


def _sharers(deployment: Deployment) -> int:
    return 1 if deployment.config.cluster.device == "cuda" else len(deployment.shards)


def _loaded(weights: Sequence[int], memory: int, sharers: int) -> list[LoadProgress]:
    """Return what shards would report after loading: the memory that is left, on a host after all weights."""
    if sharers == 1:
        return [LoadProgress(size, size, True, size, memory - size) for size in weights]
    return [LoadProgress(size, size, True, size, memory - sum(weights)) for size in weights]
