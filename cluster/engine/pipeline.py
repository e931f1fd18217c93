"""One start of a deployment: its stage processes, an engine over them, and a hang detector over both."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.config.deployment import Deployment
from cluster.config.memory_budget import compute_dtype, kv_dtype
from cluster.engine.engine import Engine
from cluster.engine.hang_detector import HangDetector
from cluster.kv_store.store import KvStore
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from cluster.text.tokenizer import TextTokenizer

_SCHEMA = "longreach kv 1"  # of keys; another one finds nothing that was stored before

if TYPE_CHECKING:
    from cluster.stages.launcher import Launched, LaunchStatus
    from cluster.stages.ray_cluster import RayCluster


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A running pipeline; `close` stops it and may be called twice. A failed one is replaced by another `Pipeline`."""

    engine: Engine
    launched: Launched
    close: Callable[[], None]


def launch_pipeline(
    deployment: Deployment, tokenizer: TextTokenizer | None, ray: RayCluster,
    on_status: Callable[[LaunchStatus], None], store: KvStore,
) -> Pipeline:  # fmt: skip
    """Start the stages of a deployment and an engine over them; returns the running pipeline.

    Raises:
        PreflightError, NodeError, CheckpointError, PlacementError, StageError: nothing is left running but Ray.
    """
    from cluster.stages.launcher import Launcher  # loads grpc

    config, spec = deployment.config, deployment.spec
    launcher = Launcher(deployment, ray, on_status)
    with ExitStack() as steps:  # undone in the opposite order: hang detector, engine, stage processes
        steps.callback(launcher.close)
        launched = launcher.start()
        pool = PagePool(launched.num_pages)
        scheduler = Scheduler(
            pool, config.kv_cache.page_size, config.prefill.max_num_batched_tokens,
            config.prefill.max_num_seqs, cache_root(deployment, launched.fingerprint), spec=spec,
            num_stages=config.cluster.pipeline_parallel_size, share_across_lengths=config.prefill.share_across_lengths,
            block_tokens=store.block_tokens, kernel_family=launched.kernel_family,
        )  # fmt: skip
        ends = {*spec.eos_token_ids, *(tokenizer.end_ids if tokenizer is not None else ())}
        engine = Engine(scheduler, launched.shards, tokenizer, sorted(ends), store=store if store.is_enabled else None)
        steps.callback(engine.close)
        store.attach(launched.shards, engine.post, pool)
        steps.callback(lambda: store.detach(*((0.0, 1.0) if engine.error else ())))
        engine.start()
        hang_detector = HangDetector(engine, launched.shards)
        steps.callback(hang_detector.close)
        hang_detector.start()
        ray.watch(engine.fail)
        return Pipeline(engine, launched, steps.pop_all().close)


def cache_root(deployment: Deployment, fingerprint: str) -> bytes:
    """Return a digest of what the content of KV depends on besides its tokens, its length scale and the kernels.

    That is the checkpoint, everything in the spec (positions, dual chunk attention, the sparse cell and budgets), and
    the types of computation and of KV. Not the layout, nor the size of steps or pages: they change the order of sums,
    and so the last bits of what is computed, as other requests in a step do, but not what is computed. One layout does:
    shards that split the query heads of a KV head choose by themselves which of them fall back to dense attention.
    """
    spec, sparse = deployment.spec, deployment.spec.sparse
    has_fallback = sparse is not None and sparse.recall_floor > 0
    split = max(1, deployment.config.cluster.expert_parallel_size // spec.num_key_value_heads) if has_fallback else 1
    values = (_SCHEMA, fingerprint, compute_dtype(deployment), kv_dtype(deployment), spec.to_json(), str(split))
    return hashlib.sha256("\0".join(values).encode()).digest()
