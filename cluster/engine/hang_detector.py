"""Tells a hung pipeline from a slow one.

Late is a step that takes longer than max(20 s, 5 x predicted). A late step is hung when meanwhile no shard's layer
counter has moved for 20 s either; a shard that does not answer does not move. Loading and warm-up happen before the
engine has any step in flight, so they are exempt.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from cluster.common.errors import StageError
from cluster.engine.engine import Engine
from protos.stage import stage_pb2 as pb

FLOOR_S = 20.0
FACTOR = 5.0
_LOOKS = 5  # while a step becomes late
_log = logging.getLogger(__name__)


class Probed(Protocol):
    """A shard that can be asked how far it is."""

    name: str

    def probe(self, timeout_s: float = 5.0) -> pb.ProbeReply:
        """Raises StageError when it does not answer."""


class Watchdog:
    """Looks at the engine's oldest step now and then; `close` may be called twice."""

    def __init__(
        self, engine: Engine, shards: Sequence[Probed], floor_s: float = FLOOR_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._shards = shards
        self._floor_s = floor_s
        self._clock = clock
        self._step = 0
        self._since = 0.0  # when this step was first seen as the oldest
        self._moved = 0.0  # when a counter was last seen to have moved
        self._counters: tuple[int | None, ...] = ()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def look(self) -> str:
        """Look once; why the pipeline is hung, or nothing."""
        now, plan = self._clock(), self._engine.oldest_plan
        if plan is None or plan.step != self._step:
            self._step, self._since, self._moved, self._counters = plan.step if plan else 0, now, now, ()
            return ""
        if now - self._since < self._floor_s / _LOOKS:
            return ""
        read = self._read()
        now = self._clock()  # shards that do not answer take time
        before = self._counters or read
        counters = tuple(old if new is None else new for new, old in zip(read, before, strict=True))
        if counters != before:
            self._moved = now
        self._counters = counters
        predicted = self._engine.latency.predict(plan)
        waited, still = now - self._since, now - self._moved
        if waited <= max(self._floor_s, FACTOR * predicted) or still <= self._floor_s:
            return ""
        silent = [shard.name for shard, count in zip(self._shards, read, strict=True) if count is None]
        who = f"{', '.join(silent)} does not answer" if silent else "no shard has finished a layer"
        return f"hung: {who}: step {plan.step} takes {waited:.0f} s where {predicted:.1f} s were predicted"

    def _read(self) -> tuple[int | None, ...]:
        with ThreadPoolExecutor(len(self._shards)) as threads:  # silent ones cost their time-out once, not each
            return tuple(threads.map(self._count, self._shards))

    def _count(self, shard: Probed) -> int | None:
        try:
            return int(shard.probe(self._floor_s / _LOOKS).layers_done)
        except StageError:
            return None

    def _run(self) -> None:
        while not self._closing.wait(self._floor_s / _LOOKS):
            if reason := self.look():
                _log.error("%s", reason)
                self._engine.break_down(reason)
                return
