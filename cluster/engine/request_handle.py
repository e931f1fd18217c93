"""A submitted request as its caller sees it, and how it is made: events while it runs, one result at its end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cluster.common.errors import EngineError
from cluster.common.text_format import describe_error
from cluster.constraints.answer import ConstrainedAnswer, open_token
from cluster.constraints.compiler import ConstraintCompiler, ConstraintError
from cluster.constraints.thinking import ThinkingBudget, closing_ids
from cluster.engine.attention_report import AttentionReport
from cluster.engine.outputs import Generation, GenerationSpec, OutputToken, PrefillProgress, Timings
from cluster.scheduler.prefix_keys import Origin
from cluster.scheduler.request import FinishReason, Request, StopRules
from cluster.text.detokenizer import OutputText
from cluster.text.reasoning import opens_reasoning
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.model.spec import ModelSpec
from protos.stage.messages import SampledToken

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
    constrained: ConstrainedAnswer | None = None  # what its answer must match
    thinking: ThinkingBudget | None = None  # what bounds its reasoning
    attention: AttentionReport = field(default_factory=AttentionReport)
    scored: list[SampledToken] = field(default_factory=list)  # tokens of the prompt, from the second on
    started: float | None = None
    first_token: float | None = None
    done: threading.Event = field(default_factory=threading.Event)
    result: Generation | None = None

    def __post_init__(self) -> None:
        self._restrict()

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

    def resume(self, samples: Sequence[SampledToken]) -> None:
        """Take tokens that another engine has sampled; the request may have ended with them."""
        for sample in samples:
            self.request.accept(sample)
            _, _, answer = self.text.push(sample.token_id)
            if self._follow(sample.token_id, answer):
                self.request.finish_reason = FinishReason.STOP

    def take_token(self) -> tuple[OutputToken, bool]:
        """Return the newest token with its text, and whether its text ends the request."""
        request = self.request
        sample = request.samples[-1]
        pieces = self.text.push(sample.token_id, is_last=request.finish_reason is not None)
        has_ended = self._follow(sample.token_id, pieces[2])
        if has_ended and not self.text.stopped:  # nothing follows that could claim what is withheld
            text, reasoning, answer = (a + b for a, b in zip(pieces, self.text.flush(), strict=True))
        else:
            text, reasoning, answer = pieces
        token = OutputToken(
            next(self.numbers), self.spec.question, sample.token_id, text, sample.logprob, sample.top,
            self.text.part, reasoning, answer,
        )  # fmt: skip
        return token, has_ended

    def _follow(self, token_id: int, answer: str) -> bool:
        """Follow the constraint and the budget of reasoning.

        Returns whether a stop string, or the end of what the constraint allows, ends the answer.
        """
        if self.text.stopped:
            return True
        if self.thinking is not None:
            self.thinking.push(self.text.part, self.text.may_reason)
        if self.constrained is not None:
            self.constrained.push(token_id, self.text.part, answer)
        self._restrict()
        return self.constrained is not None and self.constrained.is_complete

    def _restrict(self) -> None:
        """Tell the request which tokens may come next."""
        request = self.request
        if self.constrained is not None:
            request.mask, request.free_until = self.constrained.mask, 0
        elif self.thinking is not None:
            request.free_until = self.thinking.free_until
        if self.thinking is not None:
            request.forced = self.thinking.forced

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
            prompt=self._prompt(),
        )
        self.notify(self.result)
        self.done.set()

    def _prompt(self) -> tuple[SampledToken, ...]:
        if self.spec.prompt_logprobs is None:
            return ()
        return SampledToken(self.request.sequence, self.spec.prompt[0]), *self.scored

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


@dataclass(frozen=True, slots=True)
class RequestFactory:
    """Makes requests for one model; `constraints` is None where no answer can have one."""

    tokenizer: TextTokenizer | None
    eos: frozenset[int]
    constraints: ConstraintCompiler | None = None

    def open(
        self, sequence: int, spec: GenerationSpec, on_event: Callable[[EngineEvent], None], now: float,
        numbers: Iterator[int],
    ) -> RequestHandle:  # fmt: skip
        """Return a request with the tokens that it resumes after.

        Raises:
            UserError: the prompt is empty, the constraint cannot be compiled, or the tokenizer is missing for what is
                asked.
        """
        if not len(spec.prompt):
            raise UserError("prompt: 0 tokens: must have at least one")
        options = spec.options
        stops = frozenset(options.stop_token_ids) | (frozenset() if options.ignore_eos else self.eos)
        rules = StopRules(options.max_tokens, stops, options.min_tokens)
        request = Request(
            sequence, spec.prompt, options.sampling_params, rules, spec.priority, spec.pinned_len,
            Origin(spec.kernel_family, spec.cache_salt, spec.private), spec.document_id, options.logit_bias,
            prompt_logprobs=spec.prompt_logprobs, cache_ttl_s=spec.cache_ttl_s,
        )  # fmt: skip
        opened = self.tokenizer is not None and opens_reasoning(self.tokenizer, spec.prompt)
        text = OutputText(self.tokenizer, options.stop, opened, stops, options.min_tokens)
        handle = RequestHandle(
            request, spec, text, on_event, now, numbers, self._constrained(spec, stops, opened),
            self._thinking(spec, opened),
        )  # fmt: skip
        try:
            handle.resume(spec.resume)
        except ConstraintError as error:
            raise UserError(f"structured_outputs: the answer cannot go on: {error}") from error
        if spec.prompt_logprobs is not None and request.finish_reason is not None:
            raise UserError("logprobs: those of the prompt were lost with the head that computed them: ask again")
        return handle

    def _thinking(self, spec: GenerationSpec, opened: bool) -> ThinkingBudget | None:
        budget = spec.options.thinking_budget
        if budget is None:
            return None
        if self.tokenizer is None:
            raise UserError("thinking_budget: needs the model's tokenizer")
        return ThinkingBudget(budget, closing_ids(self.tokenizer, budget, spec.prompt, opened), opened)

    def _constrained(self, spec: GenerationSpec, stops: frozenset[int], opened: bool) -> ConstrainedAnswer | None:
        constraint = spec.options.structured_outputs
        if constraint is None:
            return None
        if self.constraints is None or self.tokenizer is None:
            raise UserError("structured_outputs: needs the model's tokenizer")
        open_id = None if opened else open_token(self.tokenizer, spec.options.enable_thinking)
        try:
            answer = ConstrainedAnswer(self.constraints.begin(constraint), stops, opened, open_id)
        except ConstraintError as error:
            raise UserError(f"structured_outputs: {error}") from error
        if answer.is_complete:
            raise UserError("structured_outputs: no text but the empty one can match it")
        return answer
