"""Distinguish a hung pipeline from a slow one.

A step is late after max(20 s, 5 x predicted). A late step is hung if, in addition, no shard's layer counter has moved
for 20 s; the counter of a shard that does not answer does not move. Loading and warm-up end before the engine has a
step in flight, so they are exempt. A pipeline that cannot be checked for 20 s is given up as well.

Hung are the stages whose shards do not answer; if all answer, those that compute, while the others wait for them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cluster.common.errors import StageError
from cluster.common.text_format import describe_error
from cluster.engine.engine import Engine

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle
    from protos.stage import stage_pb2 as pb

FLOOR_S = 20.0
FACTOR = 5.0
_CHECKS = 5  # within the floor
_log = logging.getLogger(__name__)


class HangDetector:
    """Checks the engine's oldest step every few seconds and fails the engine when it hangs.

    `close` may be called twice.
    """

    def __init__(
        self, engine: Engine, shards: Sequence[GrpcStageHandle], after_check: Callable[[], None] = lambda: None,
        floor_s: float = FLOOR_S, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Args: `after_check` is called on the detector's thread after every check."""
        self._engine = engine
        self._shards = shards
        self._after_check = after_check
        self._floor_s = floor_s
        self._clock = clock
        self._step = 0  # the oldest at the last check
        self._since = 0.0  # when it was first seen to be the oldest
        self._moved = 0.0  # when a counter was last seen to have moved
        self._counters: tuple[int | None, ...] = ()
        self.hung_stages: frozenset[int] = frozenset()  # set together with the reason
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hang detector", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def check(self) -> str:
        """Check once; returns why the pipeline is hung, or ""."""
        now, plan = self._clock(), self._engine.oldest_plan
        if plan is None or plan.step != self._step:
            self._step, self._since, self._moved, self._counters = plan.step if plan else 0, now, now, ()
            return ""
        if now - self._since < self._floor_s / _CHECKS:
            return ""
        replies = self._read()
        answers = tuple(None if reply is None else int(reply.layers_done) for reply in replies)
        now = self._clock()  # shards that do not answer take time
        before = self._counters or answers
        counters = tuple(old if new is None else new for new, old in zip(answers, before, strict=True))
        if counters != before:
            self._moved = now
        self._counters = counters
        predicted = self._engine.latency.predict(plan)
        waited, still = now - self._since, now - self._moved
        if waited <= max(self._floor_s, FACTOR * predicted) or still <= self._floor_s:
            return ""
        silent = [shard for shard, reply in zip(self._shards, replies, strict=True) if reply is None]
        busy = [shard for shard, reply in zip(self._shards, replies, strict=True) if reply and reply.is_computing]
        self.hung_stages = frozenset(shard.shard.stage for shard in silent or busy)
        names = ", ".join(shard.name for shard in silent)
        who = f"{names} does not answer" if silent else "no shard has finished a layer"
        return f"hung: {who}: step {plan.step} takes {waited:.0f} s where {predicted:.1f} s were predicted"

    def _read(self) -> tuple[pb.ProbeReply | None, ...]:
        with ThreadPoolExecutor(len(self._shards)) as threads:  # shards that do not answer cost one time-out together
            return tuple(threads.map(self._probe, self._shards))

    def _probe(self, shard: GrpcStageHandle) -> pb.ProbeReply | None:
        try:
            return shard.probe(self._floor_s / _CHECKS)
        except StageError:
            return None

    def _run(self) -> None:
        errors = 0  # in a row
        while not self._closing.wait(self._floor_s / _CHECKS):
            try:
                reason = self.check()
                self._after_check()
                errors = 0
            except BaseException as error:  # noqa: BLE001 - a step that hangs must not go unnoticed
                _log.exception("the hang detector failed")
                errors += 1
                reason = f"the hang detector failed: {describe_error(error)}" if errors == _CHECKS else ""
            if reason:
                _log.error("%s", reason)
                self._engine.fail(reason, self.hung_stages)
                return
