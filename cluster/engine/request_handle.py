"""A submitted request as its caller sees it: events while it runs, one result at its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from cluster.common.errors import EngineError
from cluster.common.text_format import describe_error
from cluster.engine.attention_report import AttentionReport
from cluster.engine.outputs import Generation, GenerationSpec, OutputToken, PrefillProgress, Timings
from cluster.scheduler.request import FinishReason, Request
from cluster.text.detokenizer import OutputText
from protos.model.spec import ModelSpec

EngineEvent = PrefillProgress | OutputToken | Generation
# A signal just before the lock is taken does not interrupt the wait: its handler runs once this time is over.
_SIGNAL_CHECK_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class RequestHandle:
    """A submitted request. `wait` returns its result; events also go to the submitter's callback."""

    request: Request
    spec: GenerationSpec
    text: OutputText
    on_event: Callable[[EngineEvent], None]
    submitted: float
    numbers: Iterator[int]  # for the next tokens of its submission
    attention: AttentionReport = field(default_factory=AttentionReport)
    started: float | None = None
    first_token: float | None = None
    done: threading.Event = field(default_factory=threading.Event)
    result: Generation | None = None

    def wait(self, timeout_s: float | None = None) -> Generation:
        """Return the result; raises TimeoutError, or EngineError when the cluster failed."""
        while timeout_s is None and not self.done.wait(_SIGNAL_CHECK_S):
            pass
        if not self.done.wait(timeout_s):
            raise TimeoutError(f"no result within {timeout_s} s")
        assert self.result is not None
        if self.result.finish_reason is FinishReason.ERROR:
            raise EngineError(self.result.error)
        return self.result

    def notify(self, event: EngineEvent) -> None:
        """Call the submitter; a callback that raises is not called again."""
        try:
            self.on_event(event)
        except BaseException:  # noqa: BLE001 - whatever the caller's code raises is not the engine's failure
            _log.exception("request %d: its callback raised and is not called again", self.request.sequence)
            self.on_event = lambda _event: None

    def end(
        self, reason: FinishReason, now: float, spec: ModelSpec | None, error: str = "", is_own_error: bool = False
    ) -> None:  # fmt: skip
        """Set the result, notify the submitter and let `wait` return, whatever is wrong with the request."""
        try:
            reasoning, text = self.text.result()
            attention = self.attention.summary(spec, self.request.num_prompt, self.request.scale_len)
        except BaseException as problem:  # noqa: BLE001 - its submitter waits for the end
            _log.exception("request %d: its result cannot be built", self.request.sequence)
            reasoning, text, attention = None, "", None
            if not error:
                reason, is_own_error = FinishReason.ERROR, True
                error = f"the result cannot be built: {describe_error(problem)}"
        self.result = Generation(
            token_ids=tuple(self.request.output),
            text=text,
            reasoning=reasoning,
            finish_reason=reason,
            samples=tuple(self.request.samples),
            prompt_tokens=self.request.num_prompt,
            cached_tokens=self.request.num_cached,
            timings=self._timings(now),
            error=error,
            attention=attention,
            sampling=self.request.sampling,
            is_own_error=is_own_error,
        )
        self.notify(self.result)
        self.done.set()

    def _timings(self, now: float) -> Timings:
        started = self.started if self.started is not None else now
        first = self.first_token if self.first_token is not None else now
        return Timings(
            queued_s=started - self.submitted,
            prefill_s=first - started,
            ttft_s=first - self.submitted,
            decode_s=now - first,
            total_s=now - self.submitted,
        )
