"""A session whose pipeline is a fake shard that a test lets go step by step; it can break and be started again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cluster.config.deployment import load_deployment
from cluster.engine.engine import Engine
from cluster.engine.runtime import Session
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from tests.support.fakes.stage import Clock, FakeShard
from tests.support.paths import CONFIGS

CHUNK = 64  # tokens of a step


class FakeSession(Session):
    """Token `index` of every answer is `100 + index`; no model, no processes."""

    def __init__(self, data_dir: Path, seqs: int = 2) -> None:
        config = CONFIGS / "single.yaml"
        super().__init__(load_deployment(config, {"data_dir": str(data_dir)}))
        self._seqs = seqs
        self.starts = 0
        self.before_start: Callable[[], Any] = lambda: None  # what happens while the cluster is down

    def start(self) -> None:
        self.before_start()
        self.starts += 1
        self.shard = FakeShard(0, 1, lambda sequence, index: 100 + index, Clock())
        scheduler = Scheduler(PagePool(512), 16, CHUNK, self._seqs)
        self._begin(Engine(scheduler, [self.shard], self.tokenizer))
        self.launched: Any = SimpleNamespace(shards=(), fingerprint="f", dtype="float32")

    def break_down(self) -> None:
        """The shard is lost: with it every request."""
        self.shard.lose("stage 0 shard 0 is gone")
