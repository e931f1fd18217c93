"""A runtime whose pipeline is a fake shard that a test lets go step by step; it can fail and be started again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.config.deployment import load_deployment
from cluster.engine.engine import Engine
from cluster.engine.pipeline import Pipeline
from cluster.engine.runtime import ClusterRuntime
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from protos.stage.messages import StepPlan
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import Clock, FakeShard, Script, eventually
from tests.support.paths import CONFIGS

CHUNK = 64  # tokens of a step


class FakeRuntime(ClusterRuntime):
    """Token `index` of every answer is `100 + index`; no model, no processes."""

    script: Script = staticmethod(lambda sequence, index: 100 + index)
    holds = False  # whether shards start held
    kernel_family = "fake"

    def __init__(
        self, data_dir: Path, seqs: int = 2, *, disk: FakeDisk | None = None, preload: float = 0.0, **server: object
    ) -> None:
        """
        Args:
            disk: where KV is stored, in blocks of 64 tokens; None: nowhere.
            preload: share of the KV cache that stored documents fill after a start.
            server: keys of that section of the configuration.
        """
        overrides = {"data_dir": str(data_dir)} | {f"server.{key}": value for key, value in server.items()}
        overrides |= {"kv_store.enabled": disk is not None, "kv_store.block_tokens": 64, "kv_store.preload": preload}
        super().__init__(load_deployment(CONFIGS / "single.yaml", overrides))
        self._seqs = seqs
        self.disk = disk
        self.starts = 0
        self.deadly: Callable[[StepPlan], bool] = lambda plan: False  # whether the shard dies of a plan
        self.before_start: Callable[[], Any] = lambda: None  # what happens while the cluster is down

    def _launch(self) -> Pipeline:
        self.before_start()
        self.starts += 1
        self.shard = FakeShard(0, 1, self.script, Clock())
        if self.holds:
            self.shard.hold()
        self.shard.deadly = lambda plan: self.deadly(plan)
        self.shard.disk = self.disk
        store, pool = self.kv_store, PagePool(512)
        scheduler = Scheduler(
            pool, 16, CHUNK, self._seqs, block_tokens=store.block_tokens, kernel_family=self.kernel_family
        )
        launched: Any = SimpleNamespace(
            shards=(self.shard,), num_pages=512, fingerprint="f", dtype="float32", epoch=1,
            kernel_family=self.kernel_family,
        )  # fmt: skip
        engine = Engine(
            scheduler, [self.shard], self.tokenizer, store=store if store.is_enabled else None,
            constraints=self.constraints,
        )  # fmt: skip
        store.attach(launched.shards, engine.post, pool)
        engine.start()

        def close() -> None:
            store.detach(0.0 if engine.error else 5.0)
            engine.close()

        return Pipeline(engine, launched, close)

    def fail(self) -> None:
        """Lose the shard, and every request with it."""
        eventually(lambda: hasattr(self.shard, "lose"))
        self.shard.lose("stage 0 shard 0 is gone")
