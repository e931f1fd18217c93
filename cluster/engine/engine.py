"""The main loop: schedule, send, receive, commit. One thread; everything else talks to it through one queue.

Failure contract: requests live in memory. When a shard is lost or a step fails, every unfinished request ends with the
error, and the engine answers later submissions with it. So does an error of the engine itself. A callback that raises
is logged and not called again; its request goes on.
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.common.errors import EngineError
from cluster.common.text_format import describe_error
from cluster.engine.in_flight import InFlight, Step
from cluster.engine.latency_model import LatencyModel
from cluster.engine.outputs import GenerationSpec, Progress, TokenEvent
from cluster.engine.request_handle import Event, Ticket
from cluster.scheduler.request import FinishReason, Request, StopRules
from cluster.scheduler.scheduler import Scheduler
from cluster.stages.handle import StageHandle
from cluster.text.detokenizer import OutputText
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.stage.messages import StepPlan, StepResult

_STOPPED = "the cluster was stopped"
_LONG_STEP_S = 0.25  # the pause between two steps is 1 to 2 ms
_BURST = 12  # decode steps in flight at most: no more than half of what a request has answered, which may end soon,
_BURST_AT_FIRST = 6  # but this many from the start,
_BURST_S = 0.25  # and how long they may take together: a new request and a cancel wait for them
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _News:
    """What one step meant for one request; told when the next steps are on their way."""

    ticket: Ticket
    step: Step
    token: TokenEvent | None
    progress: bool
    ended: bool


class Engine:
    """Drives the shards of one pipeline with the plans of one scheduler.

    About one plan per stage is in flight, so that stage 0 works on the next chunk while stage 1 works on this one. With
    a single stage there are two, so that it does not wait for the head between steps; but nothing is queued behind a
    chunk that takes long, since a new request would wait for that too. While the stages only decode there are more, a
    burst of a quarter of a second: tokens go from the last stage to the first without the head, plans and results
    travel together, so that head and client, who share the cores with the stages, wake once for several tokens. The
    next plans leave before anybody hears of the last results: progress and callbacks are dealt with while the stages
    compute.
    """

    def __init__(
        self, scheduler: Scheduler, shards: Sequence[StageHandle], tokenizer: TextTokenizer | None,
        eos_token_ids: Sequence[int] = (), clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.scheduler = scheduler
        self.latency = LatencyModel(scheduler.spec)
        self.on_step: Callable[[StepPlan, float], None] | None = None  # seconds of the slowest stage; for measuring
        self.on_broken: Callable[[str], None] | None = None  # called once, after every request has heard of it
        self._shards = list(shards)
        self._tokenizer = tokenizer
        self._eos = tuple(eos_token_ids)
        self._clock = clock
        self._num_stages = 1 + max(handle.shard.stage for handle in self._shards)
        self._depth = max(2, self._num_stages)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._in_flight = InFlight([handle.shard for handle in self._shards], scheduler.is_sparse)
        self._oldest: StepPlan | None = None
        self._decode_s = 0.0  # of a decode step, smoothed; 0 before the first
        self._tickets: dict[int, Ticket] = {}
        self._sequences = itertools.count(1)
        self._error = ""
        self._closed = False
        self._accepting = threading.Lock()  # no submission comes after the end of the queue
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect to the shards and begin to work."""
        for handle in self._shards:
            handle.connect(self._on_results, self._on_lost)
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what is unfinished, end the run; may be called twice."""
        with self._accepting:
            first, self._closed = not self._closed, True
        if first:
            self._inbox.put(lambda: self._fail(_STOPPED))
            self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        elif first:  # never started: what was submitted ends here
            self._fail(_STOPPED)
            self._loop()
        for handle in self._shards:
            handle.close()

    def submit(self, spec: GenerationSpec, on_event: Callable[[Event], None] = lambda event: None) -> Ticket:
        """Queue one prompt; `on_event` is called on the engine's thread and must not block.

        Raises:
            ValueError: the prompt is empty, or can never fit into the KV cache.
            EngineError: the cluster has failed.
        """
        return self.submit_all([(spec, on_event)])[0]

    def submit_all(self, items: Sequence[tuple[GenerationSpec, Callable[[Event], None]]]) -> list[Ticket]:
        """Queue several prompts at once; either all are accepted or none."""
        tickets = [self._ticket(spec, on_event) for spec, on_event in items]
        for ticket in tickets:
            self.scheduler.prepare(ticket.request)
        with self._accepting:
            if self._error or self._closed:
                raise EngineError(self._error or _STOPPED)
            self._inbox.put(lambda: self._add(tickets))
        return tickets

    def cancel(self, ticket: Ticket) -> None:
        """Stop a request; its result comes with finish reason `cancelled`, its step in flight is dropped."""
        self._inbox.put(lambda: self._cancel(ticket))

    @property
    def error(self) -> str:
        """Why the cluster failed; empty while it works."""
        return self._error

    @property
    def oldest_plan(self) -> StepPlan | None:
        """The step the pipeline owes longest; any thread may ask."""
        return self._oldest

    def break_down(self, reason: str) -> None:
        """Give the pipeline up, as if a shard were lost; any thread may call this."""
        self._on_lost(reason)

    def check_integrity(self) -> None:
        """Verify pages against requests, on the engine's own thread; raises AssertionError."""
        answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def check() -> None:
            try:
                self.scheduler.check_integrity()
            except AssertionError as error:
                answer.put(error)
            else:
                answer.put(None)

        self._inbox.put(check)
        if (error := answer.get(timeout=30)) is not None:
            raise error

    # --- the loop (engine thread) ------------------------------------------------------------------------------------

    def _loop(self) -> None:
        while (action := self._inbox.get()) is not None:
            try:
                action()
                self._fill_pipeline()
                self._oldest = next(iter(self._in_flight.plans), None)
            except Exception as error:  # noqa: BLE001 - a dead engine would leave every caller waiting
                _log.exception("the engine failed")
                self._fail(f"the engine failed: {describe_error(error)}")

    def _fill_pipeline(self) -> None:
        if self._error:
            return
        plans = []
        depth = self._depth_now()
        while len(self._in_flight) < depth and (self._num_stages > 1 or not self._is_long_underway()):
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self._in_flight.add(plan)
            self._note_start(plan)
            plans.append(plan)
        if plans:
            for handle in self._shards:
                handle.send(plans)

    def _depth_now(self) -> int:
        """Steps to have in flight: while the stages only decode, as many as `_BURST_S` holds."""
        if not self._decode_s or not self.scheduler.is_decoding:
            return self._depth
        if not all(plan.is_decode for plan in self._in_flight.plans):
            return self._depth
        answered = min((len(ticket.request.output) for ticket in self._tickets.values()), default=0)
        most = min(_BURST, max(_BURST_AT_FIRST, answered // 2))
        return max(self._depth, min(most, int(_BURST_S / self._decode_s)))

    def _is_long_underway(self) -> bool:
        return any(map(self._is_long, self._in_flight.plans))

    def _is_long(self, plan: StepPlan) -> bool:
        """Whether a step takes so long that the pause until its successor arrives does not count."""
        if plan.is_decode:
            return False
        return not self.latency.num_steps or self.latency.predict(plan) > _LONG_STEP_S

    def _results(self, results: Sequence[StepResult]) -> None:
        if self._error:
            return
        news: list[_News] = []
        error = ""
        for result in results:
            if error := result.error:
                break
            for step in self._in_flight.take(result):
                news += self._commit(step)
        if not error:
            self._fill_pipeline()
        for item in news:
            self._tell(item)
        if error:
            self._fail(error)

    def _commit(self, step: Step) -> Iterator[_News]:
        self.latency.observe(step.plan, step.slowest_s, step.cells)
        if step.plan.is_decode:
            took = self._in_flight.decode_s(self._num_stages)
            self._decode_s += (took - self._decode_s) * (0.2 if self._decode_s else 1.0)
        if self.on_step is not None:
            self.on_step(step.plan, step.slowest_s)
        touched = self.scheduler.commit(step.plan, step.samples)
        sampled = {sample.sequence for sample in step.samples}
        for request in touched:
            ticket = self._tickets[request.sequence]
            token = self._token(ticket) if request.sequence in sampled else None
            is_first = token is not None and ticket.first_token is None
            if is_first:
                ticket.first_token = self._clock()
            ended = request.finish_reason is not None
            yield _News(ticket, step, token, is_first or (token is None and not ended), ended)

    def _token(self, ticket: Ticket) -> TokenEvent:
        """The newest token with its text; a stop string in it ends the request."""
        request = ticket.request
        text, stopped = ticket.text.push(request.output[-1])
        if stopped:
            self.scheduler.stop(request, FinishReason.STOP)
            request.finish_reason = FinishReason.STOP
        elif request.finish_reason is not None:
            text += ticket.text.flush()
        return TokenEvent(request.samples[-1], text)

    def _tell(self, news: _News) -> None:
        ticket = news.ticket
        ticket.attention.add(ticket.request.sequence, news.step)
        if news.progress:
            ticket.tell(self._progress(ticket.request))
        if news.token is not None:
            ticket.tell(news.token)
        if news.ended:
            self._finish(ticket)

    def _progress(self, request: Request) -> Progress:
        processed = min(request.num_computed, request.num_prompt)
        eta = self.latency.predict_chunks(self.scheduler.chunks_left(request))
        return Progress(request.num_prompt, request.num_cached, processed, None if eta is None else round(eta * 1000))

    # --- requests (engine thread) ------------------------------------------------------------------------------------

    def _ticket(self, spec: GenerationSpec, on_event: Callable[[Event], None]) -> Ticket:
        if not len(spec.prompt):
            raise UserError("prompt: 0 tokens: must have at least one")
        stops = frozenset(spec.stop_token_ids) | (frozenset() if spec.ignore_eos else frozenset(self._eos))
        now = self._clock()
        rules = StopRules(spec.max_tokens, stops)
        request = Request(next(self._sequences), spec.prompt, spec.sampling, rules, spec.priority)
        text = OutputText(self._tokenizer, spec.stop)
        for sample in spec.resume:
            request.accept(sample)
            if text.push(sample.token_id)[1]:
                request.finish_reason = FinishReason.STOP
        return Ticket(request, spec, text, on_event, now)

    def _add(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self._tickets[ticket.request.sequence] = ticket
            if self._error:
                self._finish(ticket, self._error)
            elif ticket.request.finish_reason is not None:  # it had ended with the tokens it resumes after
                ticket.text.flush()
                self._finish(ticket)
            else:
                self.scheduler.add(ticket.request)

    def _note_start(self, plan: StepPlan) -> None:
        for part in plan.slices:
            ticket = self._tickets[part.sequence]
            if ticket.started is None:
                ticket.started = self._clock()
                ticket.tell(self._progress(ticket.request))

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.done.is_set():
            self.scheduler.stop(ticket.request, FinishReason.CANCELLED)
            self._finish(ticket)

    def _fail(self, error: str) -> None:
        first, self._error = not self._error, self._error or error
        self._in_flight.clear()
        for ticket in list(self._tickets.values()):
            self._finish(ticket, self._error)
        if first and self.on_broken is not None and not self._closed:
            self.on_broken(error)

    def _finish(self, ticket: Ticket, error: str = "") -> None:
        request = ticket.request
        self._tickets.pop(request.sequence, None)
        reason = FinishReason.ERROR if error else request.finish_reason
        assert reason is not None
        ticket.end(reason, self._clock(), self.scheduler.spec, error)

    # --- other threads -----------------------------------------------------------------------------------------------

    def _on_results(self, results: Sequence[StepResult]) -> None:
        self._inbox.put(lambda: self._results(results))

    def _on_lost(self, reason: str) -> None:
        self._inbox.put(lambda: self._fail(reason))
