"""The main loop: schedule, send, receive, commit. One thread; other threads reach it through one queue of actions.

Failure contract: requests live in memory. When a shard is lost or a step fails, every unfinished request ends with the
error, no token follows, and later submissions raise it. The same holds for an error of the engine itself. An error
about one request (its text, its progress, its start) ends that request. A callback that raises is logged and not called
again; its request goes on.

Stored KV is looked up, read and written beside the steps (`stored_kv`); what is answered comes through the queue.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cluster.common.errors import EngineError
from cluster.common.text_format import describe_error
from cluster.constraints.compiler import ConstraintCompiler
from cluster.engine.in_flight import InFlightStep, InFlightSteps
from cluster.engine.outputs import GenerationSpec, OutputToken, PrefillProgress
from cluster.engine.request_handle import EngineEvent, RequestFactory, RequestHandle
from cluster.kv_store.store import KvStore
from cluster.kv_store.stored_kv import StoredKv
from cluster.latency.model import LatencyModel
from cluster.scheduler.request import FinishReason, Request
from cluster.scheduler.scheduler import Scheduler
from cluster.text.tokenizer import TextTokenizer
from protos.stage.messages import StepPlan, StepResult

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle

_STOPPED = "the cluster was stopped"
_LONG_STEP_S = 0.25  # no step waits behind one this long; the 1 to 2 ms until its successor arrives do not matter
_MAX_BURST = 12  # upper bound on decode steps in flight
_MIN_BURST = 6  # lower bound, while an answer is so short that half of its tokens are fewer
_BURST_S = 0.25  # upper bound on their total time: a cancel or a new request waits this long
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What a committed step changed for one request.

    Delivered after the next plans are sent, so that callbacks overlap with the compute of the stages.
    """

    handle: RequestHandle
    step: InFlightStep
    token: OutputToken | None
    has_progress: bool  # of the prefill
    has_ended: bool


class Engine:
    """Drives the shards of one pipeline with the plans of one scheduler.

    About one plan per stage is in flight, so that stage 0 computes the next chunk while stage 1 computes this one. A
    single stage gets two, so that it need not wait for the head process between steps; but nothing is queued behind a
    step that takes long, since a new request would wait for it too.

    In pure decode a burst of up to `_BURST_S` seconds is in flight: sampled tokens go from the last stage to the first
    without the head process, and plans and results travel together, so that the head process and its clients, who
    share the cores with the stages, wake up once for several tokens.
    """

    def __init__(
        self, scheduler: Scheduler, shards: Sequence[GrpcStageHandle], tokenizer: TextTokenizer | None,
        eos_token_ids: Sequence[int] = (), clock: Callable[[], float] = time.monotonic, store: KvStore | None = None,
        latency: LatencyModel | None = None, constraints: ConstraintCompiler | None = None,
    ) -> None:  # fmt: skip
        """Args: `store` is attached to this engine; `latency` is what one before it has learned about the shards."""
        self.scheduler = scheduler
        self.latency = latency or LatencyModel(scheduler.spec)
        self.lost_stages: set[int] = set()  # with a shard that is gone or hangs
        self.error = ""  # why the pipeline failed; "" while it works
        self.suspects: frozenset[int] = frozenset()  # sequences that may be the reason; set together with `error`
        self.oldest_plan: StepPlan | None = None  # of those in flight; set by the engine's thread only
        self.on_step: Callable[[StepPlan, float], None] | None = None  # seconds of the slowest stage; for measuring
        self.on_result: Callable[[StepResult], None] | None = None  # of every shard, as it comes; for measuring
        self.on_failure: Callable[[], None] | None = None  # called once, when every request has ended with `error`
        self._shards = list(shards)
        self._requests = RequestFactory(tokenizer, frozenset(eos_token_ids), constraints)
        self._clock = clock
        self._stored_kv = (
            None if store is None else StoredKv(scheduler, store, self._note_start, self._note_loaded, self._fail)
        )
        self._num_stages = 1 + max(shard.shard.stage for shard in self._shards)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._in_flight = InFlightSteps([shard.shard for shard in self._shards], scheduler.is_sparse)
        self.has_worked = False  # a step is committed
        self._decode_s = 0.0  # of one decode step through all stages, smoothed; 0 before the first
        self._handles: dict[int, RequestHandle] = {}
        self._sequences = itertools.count(1)
        self._closed = False
        self._accepting = threading.Lock()  # no submission is queued after `close`
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect to the shards and start the thread."""
        for shard in self._shards:
            on_lost = partial(self.fail, stages=(shard.shard.stage,))
            shard.connect(lambda results: self._inbox.put(lambda: self._receive(results)), on_lost)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End every unfinished request with an error, and the shards; may be called twice."""
        self.stop()
        for shard in self._shards:
            shard.close()

    def stop(self) -> None:
        """End every unfinished request with an error; the shards stay as they are. May be called twice."""
        with self._accepting:
            first, self._closed = not self._closed, True
        if first:
            self._inbox.put(lambda: self._fail(_STOPPED))
            self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        elif first:  # it was never started: what was submitted ends here
            self._fail(_STOPPED)
            self._loop()

    def submit_all(
        self, items: Sequence[tuple[GenerationSpec, Callable[[EngineEvent], None]]], after: int = 0
    ) -> list[RequestHandle]:
        """Queue prompts, each with a callback that runs on the engine's thread and must not block; all or none.

        Args:
            after: the number before that of their first token; the tokens of all of them are numbered together.

        Raises:
            ValueError: a prompt is empty, or can never fit into the KV cache.
            EngineError: the pipeline has failed, or was stopped.
        """
        numbers = itertools.count(after + 1)
        handles = [self._handle(spec, on_event, numbers) for spec, on_event in items]
        for handle in handles:
            self.scheduler.prepare(handle.request)
        with self._accepting:
            if self.error or self._closed:
                raise EngineError(self.error or _STOPPED)
            self._inbox.put(lambda: self._add(handles))
        return handles

    def cancel(self, handle: RequestHandle) -> None:
        """Stop a request; its result has finish reason `cancelled`, and its steps in flight are dropped."""
        self._inbox.put(lambda: self._cancel(handle))

    def keep_documents(self, read_living: Callable[[], Collection[str]]) -> None:
        """Let nobody find KV in memory of other documents than `read_living` returns; later requests count on it."""
        later = next(self._sequences)  # requests from here on may be about a document that is added meanwhile
        living = read_living()
        self._inbox.put(lambda: self.scheduler.keep_documents(living, later))

    def post(self, action: Callable[[], None]) -> None:
        """Call a function on the engine's thread, soon; after the end of the engine, never."""
        self._inbox.put(action)

    def fail(self, reason: str, stages: Iterable[int] = ()) -> None:
        """Give the pipeline up, as if a shard of `stages` were lost; any thread may call this, any number of times."""
        self.lost_stages |= set(stages)
        self._inbox.put(lambda: self._fail(reason))

    # --- the loop (engine thread) ------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while True:
            try:
                if (action := self._inbox.get()) is None:
                    return
                action()
                self._schedule_and_send()
                self.oldest_plan = next(iter(self._in_flight.plans), None)
            except BaseException as error:  # noqa: BLE001 - a dead engine would leave every caller waiting
                _log.exception("the engine failed")
                self._fail(f"the engine failed: {describe_error(error)}", frozenset(self._handles))

    def _schedule_and_send(self) -> None:
        """Send new plans to every shard until as many are in flight as the pipeline should have."""
        plans: list[StepPlan] = []
        depth = 0 if self.error else self._target_depth()
        while len(self._in_flight) < depth and (self._num_stages > 1 or not self._has_long_step()):
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self._in_flight.add(plan)
            for part in plan.slices:
                self._note_start(part.sequence)
            plans.append(plan)
        if plans:
            for shard in self._shards:
                shard.send(plans)
        if self._stored_kv is not None and not self.error:
            self._stored_kv.work()

    def _target_depth(self) -> int:
        """Return how many steps to have in flight: the scheduler's depth; in pure decode, a burst of them.

        At most half of the tokens of the shortest answer are in a burst, since an answer may end in any of them.
        """
        depth = self.scheduler.depth
        if not self._decode_s or not self.scheduler.is_decoding:
            return depth
        if not all(plan.is_decode for plan in self._in_flight.plans):
            return depth
        shortest = min((len(handle.request.output) for handle in self._handles.values()), default=0)
        limit = min(_MAX_BURST, max(_MIN_BURST, shortest // 2))
        return max(depth, min(limit, int(_BURST_S / self._decode_s)))

    def _has_long_step(self) -> bool:
        """Return whether a prefill step in flight is long, or of unknown length."""
        prefill = [plan for plan in self._in_flight.plans if not plan.is_decode]
        return any(not self.latency.num_steps or self.latency.predict(plan) > _LONG_STEP_S for plan in prefill)

    def _receive(self, results: Sequence[StepResult]) -> None:
        """Commit the steps that `results` complete, send the next plans, then notify callers."""
        if self.error:
            return
        outcomes: list[StepOutcome] = []
        error = ""
        for result in results:
            if error := result.error:
                break
            if self.on_result is not None:
                self.on_result(result)
            for step in self._in_flight.take(result):
                outcomes += self._commit(step)
        if not error:
            self._schedule_and_send()
        for outcome in outcomes:
            self._notify(outcome)
        if error:
            self._fail(error)

    def _commit(self, step: InFlightStep) -> Iterator[StepOutcome]:
        """Apply a finished step to scheduler and requests; yields what it changed for each of its requests."""
        self.latency.observe(step.plan, step.slowest_s, step.cells, step.stage_s)
        if step.plan.is_decode:
            seconds = self._in_flight.decode_s(self._num_stages)
            self._decode_s += (seconds - self._decode_s) * (0.2 if self._decode_s else 1.0)
        if self.on_step is not None:
            self.on_step(step.plan, step.slowest_s)
        for target in step.targets:
            if (asked := self._handles.get(target.sequence)) is not None:
                asked.scored.append(target)
        touched = self.scheduler.commit(step.plan, step.samples)
        self.has_worked = True
        if self._stored_kv is not None:
            self._stored_kv.offer(touched)
        sampled = {sample.sequence for sample in step.samples}
        for request in touched:
            handle = self._handles[request.sequence]
            try:
                token = self._token(handle) if request.sequence in sampled else None
            except BaseException as error:  # noqa: BLE001 - an error in one text must not end the others
                self._break(handle, error)
                continue
            is_first = token is not None and handle.first_token is None
            if is_first:
                handle.first_token = self._clock()
            has_ended = request.finish_reason is not None
            yield StepOutcome(handle, step, token, is_first or (token is None and not has_ended), has_ended)

    def _token(self, handle: RequestHandle) -> OutputToken:
        """The newest token with its text, which may end the request."""
        token, has_ended = handle.take_token()
        if has_ended:
            self.scheduler.stop(handle.request, FinishReason.STOP)
            handle.request.finish_reason = FinishReason.STOP
        return token

    def _notify(self, outcome: StepOutcome) -> None:
        """Call the submitter of a request with what a step changed for it."""
        handle = outcome.handle
        try:
            handle.attention.add(handle.request.sequence, outcome.step)
            if outcome.has_progress:
                handle.notify(self._progress(handle.request))
        except BaseException as error:  # noqa: BLE001 - an error about one request must not end the others
            self._break(handle, error)
            return
        if outcome.token is not None:
            handle.notify(outcome.token)
        if outcome.has_ended:
            self._finish(handle)

    def _progress(self, request: Request) -> PrefillProgress:
        processed = min(request.num_computed, request.num_prompt)
        eta = self.latency.predict_chunks(self.scheduler.chunks_left(request))
        return PrefillProgress(
            request.num_prompt, request.num_cached, processed, None if eta is None else round(eta * 1000)
        )

    # --- requests (engine thread) ------------------------------------------------------------------------------------

    def _handle(
        self, spec: GenerationSpec, on_event: Callable[[EngineEvent], None], numbers: Iterator[int]
    ) -> RequestHandle:
        return self._requests.open(next(self._sequences), spec, on_event, self._clock(), numbers)

    def _add(self, handles: Sequence[RequestHandle]) -> None:
        for handle in handles:
            self._handles[handle.request.sequence] = handle
            if self.error:
                self._finish(handle, self.error)
                continue
            try:
                if handle.request.finish_reason is None:
                    self.scheduler.add(handle.request)
                else:  # it ended with the tokens that it resumes after
                    handle.text.flush()
                    self._finish(handle)
            except BaseException as error:  # noqa: BLE001 - an error about one request must not end the others
                self._break(handle, error)

    def _note_start(self, sequence: int) -> None:
        """Notify the submitter of a request that begins, if it has not begun before."""
        handle = self._handles[sequence]
        if handle.started is None:
            handle.started = self._clock()
            self._notify_progress(handle)

    def _note_loaded(self, sequence: int) -> None:
        """Notify the submitter of a request whose stored KV is loaded."""
        if (handle := self._handles.get(sequence)) is not None:
            self._notify_progress(handle)

    def _notify_progress(self, handle: RequestHandle) -> None:
        try:
            handle.notify(self._progress(handle.request))
        except BaseException as error:  # noqa: BLE001 - an error about one request must not end the others
            self._break(handle, error)

    def _cancel(self, handle: RequestHandle) -> None:
        if not handle.done.is_set():
            self.scheduler.stop(handle.request, FinishReason.CANCELLED)
            self._finish(handle)

    def _break(self, handle: RequestHandle, error: BaseException) -> None:
        """End one request because of an error of ours that is about it alone."""
        sequence = handle.request.sequence
        _log.error("request %d failed", sequence, exc_info=error)
        if self._handles.get(sequence) is handle:
            with contextlib.suppress(ValueError):  # it was not queued yet
                self.scheduler.stop(handle.request, FinishReason.ERROR)
            self._finish(handle, f"the request failed: {describe_error(error)}", is_own_error=True)

    def _fail(self, error: str, suspects: frozenset[int] = frozenset()) -> None:
        """End every request with `error`; the first error stays. `suspects`: sequences, if not those in flight."""
        if is_first := not self.error:
            in_flight = {part.sequence for plan in self._in_flight.plans for part in plan.slices}
            started = {sequence for sequence, handle in self._handles.items() if handle.started is not None}
            self.suspects = suspects or frozenset(in_flight or started)
            self.error = error
        self._in_flight.clear()
        self.oldest_plan = None
        for handle in list(self._handles.values()):
            self._finish(handle, self.error)
        if is_first and self.on_failure is not None and not self._closed:
            self.on_failure()

    def _finish(self, handle: RequestHandle, error: str = "", is_own_error: bool = False) -> None:
        request = handle.request
        self._handles.pop(request.sequence, None)
        reason = FinishReason.ERROR if error else request.finish_reason
        assert reason is not None
        handle.end(reason, self._clock(), self.scheduler.spec, error, is_own_error)
