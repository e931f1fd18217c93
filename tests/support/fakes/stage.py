"""An engine over fake shards and a clock that passes only when a shard computes."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.config.schema import KvStoreSection
from cluster.engine.engine import Engine
from cluster.engine.outputs import Generation, GenerationSpec
from cluster.engine.request_handle import EngineEvent, RequestHandle
from cluster.kv_store.store import KvStore
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.scheduler import Scheduler
from cluster.stages.handle import StageError
from cluster.text.tokenizer import TextTokenizer
from protos.model.spec import ModelSpec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import (
    CellReport,
    SampledToken,
    SequenceSlice,
    ShardSpec,
    Span,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from tests.support.data.specs import generation_spec
from tests.support.fakes.kv import FakeDisk, FakeKvShard
from tests.support.oracles.integrity import check_engine
from tests.support.paths import NEEDLE

EMPTY = Span(0, 0)
WAIT = 20.0
Script = Callable[[int, int], int]


class Clock:
    """Seconds that pass only when a test or a shard says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeShard(FakeKvShard):
    """Answers plans as soon as the gate allows; `script(sequence, index)` gives the tokens.

    Under a mask that does not have it, the token is one of the mask that depends on the index.
    """

    def __init__(self, stage: int, stages: int, script: Script, clock: Clock, rank: int = 0) -> None:
        super().__init__()
        self.shard = ShardSpec(stage, stages, rank, 1, Span(0, 1), EMPTY, EMPTY, EMPTY, EMPTY, EMPTY)
        self.name = f"stage {stage} shard {rank}"
        self.script = script
        self.plans: list[StepPlan] = []
        self.bursts: list[int] = []  # how many of them came together
        self.step_s = 0.5  # as it says
        self.group = 1  # results that are given back together
        self.fail_at: int | None = None
        self.closed = 0
        self.state = "running"
        self.deadly: Callable[[StepPlan], bool] = lambda plan: False  # whether the process dies of a plan
        self.report: Callable[[StepPlan], tuple[CellReport, ...]] = lambda plan: ()  # of sparse cells
        self._clock = clock
        self._gate = threading.Semaphore(1 << 30)
        self._queue: queue.SimpleQueue[StepPlan | None] = queue.SimpleQueue()

    def connect(self, on_results: Callable[[Sequence[StepResult]], None], on_lost: Callable[[str], None]) -> None:
        self.lose = on_lost
        self._queue = queue.SimpleQueue()  # of its own: the thread of an earlier connection may still wait at the other
        threading.Thread(target=self._run, args=(on_results, self._queue), daemon=True).start()

    def send(self, plans: Sequence[StepPlan]) -> None:
        self.plans.extend(plans)
        self.bursts.append(len(plans))
        for plan in plans:
            self._queue.put(plan)

    def close(self) -> None:
        self.closed += 1
        self._gate.release(1000)
        self._queue.put(None)

    def abandon(self) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        self._queue.put(None)

    def probe(self, timeout_s: float = 5.0) -> pb.ProbeReply:
        if self.closed:
            raise StageError(f"{self.name} does not answer")
        return pb.ProbeReply(state=self.state, steps_done=len(self.plans), layers_done=len(self.plans))

    def hold(self) -> None:
        self._gate = threading.Semaphore(0)

    def let(self, steps: int) -> None:
        self._gate.release(steps)

    def _run(
        self, on_results: Callable[[Sequence[StepResult]], None], plans: queue.SimpleQueue[StepPlan | None]
    ) -> None:
        results: list[StepResult] = []
        while (plan := plans.get()) is not None:
            self._gate.acquire()
            if self.deadly(plan):
                self.lose(f"{self.name} is gone")
                return
            self._clock.now += self.step_s
            error = "stage 0 shard 0, step 1: broken" if plan.step == self.fail_at else ""
            samples = tuple(
                SampledToken(part.sequence, self._token(part), *self._logprobs(part))
                for part in plan.slices
                if part.sample and self.shard.is_last
            )
            targets = tuple(
                SampledToken(
                    part.sequence, token, -1.0 - token / 1000, tuple(TokenLogprob(i, -0.5) for i in range(part.top))
                )
                for part in plan.slices
                for token in part.targets
                if self.shard.is_last
            )
            where = self.shard.stage, self.shard.rank
            cells = self.report(plan)
            estimate_us = 100_000 if cells else 0
            took_us = round(self.step_s * 1e6)
            results.append(StepResult(plan.step, *where, took_us, samples, error, cells, estimate_us, targets))
            if len(results) >= self.group or plans.empty():
                on_results(results)
                results = []

    def _token(self, part: SequenceSlice) -> int:
        assert part.sample is not None
        if part.sample.forced is not None:
            return part.sample.forced
        token, mask = self.script(part.sequence, part.sample.token_index), part.sample.mask
        if not mask or (token < 8 * len(mask) and mask[token // 8] >> token % 8 & 1):
            return token
        allowed = [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]
        return random.Random(part.sample.token_index).choice(allowed)

    @staticmethod
    def _logprobs(part) -> tuple:
        return () if part.sample.params.logprobs is None else (-0.5, (TokenLogprob(1, -0.5),))


def submit(
    engine: Engine, spec: GenerationSpec, on_event: Callable[[EngineEvent], None] = lambda event: None
) -> RequestHandle:
    """Queue one prompt."""
    (handle,) = engine.submit_all([(spec, on_event)])
    return handle


class Rig:
    """An engine over fake stages."""

    def __init__(
        self, script: Script = lambda sequence, index: 1000 + index, stages: int = 2, budget: int = 64,
        pages: int = 64, eos: Sequence[int] = (), text: bool = False, spec: ModelSpec | None = None, ranks: int = 1,
        disk: FakeDisk | None = None, block_tokens: int = 32, **store: Any,
    ) -> None:  # fmt: skip
        """Args: `store` are keys of the section `kv_store`; without a `disk` there is none."""
        self.clock = Clock()
        self.shards = [
            FakeShard(stage, stages, script, self.clock, rank)
            for stage in range(stages)
            for rank in reversed(range(ranks))
        ]
        self.tokenizer = TextTokenizer.open(NEEDLE) if text else None
        for shard in self.shards:
            shard.disk = disk
        self.store = KvStore(KvStoreSection(block_tokens=block_tokens, **store), disk is not None)
        self.pool = PagePool(pages)
        scheduler = Scheduler(
            self.pool, 16, budget, 8, spec=spec, num_stages=stages, block_tokens=self.store.block_tokens
        )
        self.engine = Engine(
            scheduler, self.shards, self.tokenizer, eos, clock=self.clock,
            store=self.store if self.store.is_enabled else None,
        )  # fmt: skip

    def __enter__(self) -> Rig:
        self.store.attach(self.shards, self.engine.post, self.pool)
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.store.detach(0.0 if self.engine.error else 5.0)
        self.engine.close()

    @property
    def last(self) -> FakeShard:
        return self.shards[-1]

    def submit(self, prompt: Sequence[int], max_tokens: int = 3, **spec) -> tuple[RequestHandle, list[EngineEvent]]:
        events: list[EngineEvent] = []
        return submit(self.engine, generation_spec(prompt, max_tokens, **spec), events.append), events

    def run(self, prompt: Sequence[int], max_tokens: int = 3, **spec) -> tuple[Generation, list[EngineEvent]]:
        handle, events = self.submit(prompt, max_tokens, **spec)
        result = handle.wait(WAIT)
        check_engine(self.engine)
        return result, events


def eventually(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.002)
