"""A deployment that runs: its stage processes, an engine over them, and a hang detector over both."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.common.errors import StageError
from cluster.config.deployment import Deployment
from cluster.config.memory_budget import compute_dtype, kv_dtype
from cluster.constraints.compiler import ConstraintCompiler
from cluster.engine.engine import Engine
from cluster.engine.hang_detector import HangDetector
from cluster.kv_store.store import KvStore
from cluster.latency.latency_file import LatencyFile
from cluster.latency.model import LatencyModel
from cluster.latency.pipeline_work import dynamic_chunks, measured_on, stage_times, stage_works, usual_costs
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from cluster.text.tokenizer import TextTokenizer
from protos.model.spec import ModelSpec
from protos.node.environment import usable_cores

_FLUSH_WITHOUT_RAY_S = 3.0  # its loss ends the pipeline, and the shards still work
_SCHEMA = "longreach kv 1"  # of keys; another one finds nothing that was stored before

if TYPE_CHECKING:
    from cluster.stages.launcher import Launched, Launcher, LaunchStatus
    from cluster.stages.ray_cluster import RayCluster

_log = logging.getLogger(__name__)


class CannotRepair(StageError):
    """A failed pipeline must be started anew as a whole."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A running pipeline; `close` stops it and may be called twice. A failed one is replaced by another `Pipeline`.

    `repair`, None with one stage, makes that from the same processes, but for those of the stages that are the reason
    of the failure, which are replaced: the others keep weights and KV. Where none is, as when only a link broke, all
    are linked again and keep their weights. It raises CannotRepair where too many stages are broken or Ray is gone,
    else what `launch_pipeline` raises; this one can then only be closed.
    """

    engine: Engine
    launched: Launched
    close: Callable[[], None]
    repair: Callable[[], Pipeline] | None = None


def launch_pipeline(
    deployment: Deployment, tokenizer: TextTokenizer | None, ray: RayCluster,
    on_status: Callable[[LaunchStatus], None], store: KvStore, constraints: ConstraintCompiler | None = None,
) -> Pipeline:  # fmt: skip
    """Start the stages of a deployment and an engine over them; returns the running pipeline.

    Raises:
        PreflightError, NodeError, CheckpointError, PlacementError, StageError: nothing is left running but Ray.
    """
    from cluster.stages.launcher import Launcher  # loads grpc

    launcher = Launcher(deployment, ray, on_status)
    with ExitStack() as steps:
        steps.callback(launcher.close)
        launched = launcher.start()
        assembly = _Assembly(deployment, tokenizer, ray, launcher, store, constraints)
        pipeline = assembly.connect(launched, PagePool(launched.num_pages))
        steps.pop_all()
        return pipeline


@dataclass(frozen=True, slots=True)
class _Assembly:
    """What a pipeline and its repaired successors are made of."""

    deployment: Deployment
    tokenizer: TextTokenizer | None
    ray: RayCluster
    launcher: Launcher
    store: KvStore
    constraints: ConstraintCompiler | None

    def connect(self, launched: Launched, pool: PagePool, latency: LatencyModel | None = None) -> Pipeline:
        """Start an engine over running stages; whatever fails, the engine is closed, the launcher is the caller's.

        Args:
            latency: what the engine before has learned; None: what the data directory keeps.
        """
        cores = usable_cores()
        of = measured_on(self.deployment, launched.kernel_family, cores)
        latency_file = LatencyFile(self.deployment.config.data_dir, of)
        if latency is None:
            usual = usual_costs(self.deployment, cores)
            works, stages = stage_works(self.deployment), stage_times(self.deployment, usual)
            latency = LatencyModel(self.deployment.spec, works, usual, stages)
            latency_file.load(latency)
        engine = self._engine(launched, pool, latency)
        with ExitStack() as steps:  # undone in the opposite order: hang detector, KV store, engine, stage processes
            steps.callback(latency_file.save, latency)
            steps.callback(engine.close)
            self.store.attach(launched.shards, engine.post, pool)
            steps.callback(lambda: self._leave_store(engine))
            engine.start()
            hang_detector = HangDetector(engine, launched.shards, lambda: latency_file.save_sometimes(latency))
            steps.callback(hang_detector.close)
            hang_detector.start()
            self.ray.watch(engine.fail)
            stop = steps.pop_all()
        closing = ExitStack()
        closing.callback(self.launcher.close)
        closing.push(stop)

        def repair() -> Pipeline:
            hang_detector.close()
            return self._repair(engine, launched, pool)

        has_others = self.deployment.config.cluster.pipeline_parallel_size > 1
        return Pipeline(engine, launched, closing.close, repair if has_others else None)

    def _leave_store(self, engine: Engine) -> None:
        """Write blocks that are not stored yet, for a moment, if all shards can: what is lost is computed again."""
        if not engine.error:
            self.store.detach()
        else:
            self.store.detach(_FLUSH_WITHOUT_RAY_S if self.ray.lost and not engine.lost_stages else 0.0, 1.0)

    def _engine(self, launched: Launched, pool: PagePool, latency: LatencyModel) -> Engine:
        config, spec, store = self.deployment.config, self.deployment.spec, self.store
        scheduler = Scheduler(
            pool, config.kv_cache.page_size, config.prefill.max_num_batched_tokens,
            config.prefill.max_num_seqs, cache_root(self.deployment, launched.fingerprint), spec=spec,
            num_stages=config.cluster.pipeline_parallel_size, share_across_lengths=config.prefill.share_across_lengths,
            block_tokens=store.block_tokens, kernel_family=launched.kernel_family,
            dynamic=dynamic_chunks(self.deployment),
        )  # fmt: skip
        return Engine(
            scheduler, launched.shards, self.tokenizer, end_ids(spec, self.tokenizer),
            store=store if store.is_enabled else None, latency=latency, constraints=self.constraints,
        )  # fmt: skip

    def _repair(self, failed: Engine, launched: Launched, pool: PagePool) -> Pipeline:
        """Replace the broken stages under a failed engine; what their new shards do not have of KV is forgotten."""
        from cluster.stages.launcher import broken_stages  # loads grpc

        if self.ray.lost:
            raise CannotRepair(self.ray.lost)
        broken = broken_stages(launched.shards) | failed.lost_stages
        for shard in launched.shards:
            if shard.shard.stage in broken:
                shard.abandon()  # nobody waits for an answer any more
        is_at_rest = self.store.detach(0.0, replaced=broken)
        failed.stop()
        num_stages = self.deployment.config.cluster.pipeline_parallel_size
        if 2 * len(broken) > num_stages:
            raise CannotRepair(f"{len(broken)} of {num_stages} stages are broken")
        if not is_at_rest:
            raise CannotRepair("a shard still reads or writes stored KV")
        _log.warning("replacing stages %s of %d, linking the others again", sorted(broken), num_stages)
        repaired = self.launcher.repair(launched, broken)
        pool.release_all()
        if broken and self.store.is_enabled:
            self.store.refill(pool, [shard for shard in repaired.shards if shard.shard.stage in broken])
        else:  # without a broken stage the engine itself may be the reason: what it says of pages is not trusted
            pool.unpublish(pool.published())
        return self.connect(repaired, pool, failed.latency)


def end_ids(spec: ModelSpec, tokenizer: TextTokenizer | None) -> list[int]:
    """Return the tokens that end an answer, of the model and of its tokenizer."""
    return sorted({*spec.eos_token_ids, *(tokenizer.end_ids if tokenizer is not None else ())})


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
