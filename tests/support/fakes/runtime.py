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
from tests.support.fakes.stage import Clock, FakeShard, Script
from tests.support.paths import CONFIGS

CHUNK = 64  # tokens of a step


class FakeRuntime(ClusterRuntime):
    """Token `index` of every answer is `100 + index`; no model, no processes."""

    script: Script = staticmethod(lambda sequence, index: 100 + index)
    holds = False  # whether shards start held

    def __init__(self, data_dir: Path, seqs: int = 2, **server: object) -> None:
        """Args: `server` are keys of that section of the configuration."""
        overrides = {"data_dir": str(data_dir)} | {f"server.{key}": value for key, value in server.items()}
        super().__init__(load_deployment(CONFIGS / "single.yaml", overrides))
        self._seqs = seqs
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
        scheduler = Scheduler(PagePool(512), 16, CHUNK, self._seqs)
        launched: Any = SimpleNamespace(shards=(self.shard,), num_pages=512, fingerprint="f", dtype="float32", epoch=1)
        engine = Engine(scheduler, [self.shard], self.tokenizer)
        engine.start()
        return Pipeline(engine, launched, engine.close)

    def fail(self) -> None:
        """Lose the shard, and every request with it."""
        self.shard.lose("stage 0 shard 0 is gone")
