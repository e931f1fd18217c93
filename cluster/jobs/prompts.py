"""Turn a job into token ids: the same ones when it is submitted and when a later head process resumes it."""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial

from cluster.common.text_format import one_line
from cluster.constraints.trial import CompilerBusy
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.document.tokens import DocumentTokens
from cluster.jobs.model import ContextTooLong, InvalidJob, JobInput, JobRecord, JobSpec, ServiceBusy
from cluster.text.chat_template import render_user_message
from cluster.text.prompts import PromptTooLong, check_size, decode_document
from cluster.text.reasoning import opens_reasoning
from cluster.text.templates.process import RendererBusy
from cluster.text.tokenizer import TooManyTokens
from cluster.text.tools.formats import ToolFormat
from cluster.text.tools.prompt import chat_texts
from protos.errors import UserError
from protos.jobs.constraint import Constraint
from protos.jobs.limits import MAX_SCORED_TOKENS, MAX_UINT32

_READ = "Continue."  # asked where a document is only read; its answer is not shown
_CLOCK = "clock"  # in what is stored to get the same tokens again
_AT_A_TIME = 4  # jobs whose long texts are in memory to be tokenised; others wait
_LONG_BYTES = 1 << 18
BUILD_WAIT_S = 20.0  # of a submission, for its turn
_turns = threading.BoundedSemaphore(_AT_A_TIME)


def job_prompts(
    runtime: ClusterRuntime, documents: DocumentTokens, spec: JobSpec, now: datetime | None = None,
    wait_s: float | None = None,
) -> list[array[int]]:  # fmt: skip
    """Return the token ids of every question. Sizes are checked before anything is read.

    Args:
        now: what the clock of the chat template says, see `clock_of`; None reads the clock.
        wait_s: how long to wait while the texts of other jobs are tokenised; None for as long as it takes.

    Raises:
        InvalidJob: the prompts cannot be built, or are too long. JobNotFound: the document is gone. ServiceBusy: other
            jobs took too long, or keep the process that renders chat templates.
    """
    with contextlib.ExitStack() as turn:

        def begin(size: int) -> None:
            if size > _LONG_BYTES:  # short ones never wait, so that slow chat templates hold up nobody else
                turn.enter_context(_turn(wait_s))

        return _job_prompts(runtime, documents, spec, now, begin)


@contextlib.contextmanager
def _turn(wait_s: float | None) -> Iterator[None]:
    if not _turns.acquire(timeout=wait_s):
        raise ServiceBusy(f"prompts: {_AT_A_TIME} others have been read for {wait_s:g} s: try again", 5.0)
    try:
        yield
    finally:
        _turns.release()


def check_text(runtime: ClusterRuntime, num_bytes: int) -> None:
    """Refuse a document that cannot fit, whatever its tokens are, by its bytes alone (InvalidJob)."""
    try:
        check_size(num_bytes, runtime.tokenizer, runtime.max_model_len)
    except UserError as error:
        raise _refusal(error) from error


def has_length_scale(runtime: ClusterRuntime) -> bool:
    """Return whether positions of the model depend on the length of a prompt."""
    dual = runtime.deployment.spec.dual_chunk
    return dual is not None and dual.original_max_position_embeddings > 0


def document_ids(
    runtime: ClusterRuntime, documents: DocumentTokens, document_id: str, wait_s: float | None = BUILD_WAIT_S
) -> Sequence[int]:
    """Return the token ids of a document where prompts have it. `wait_s` and what it raises: as of `job_prompts`."""
    with contextlib.ExitStack() as turn, _invalid():

        def begin(size: int) -> None:
            check_text(runtime, size)
            if size > _LONG_BYTES:
                turn.enter_context(_turn(wait_s))

        return documents.ids(document_id, documents.place(), begin)


def count_text(runtime: ClusterRuntime, documents: DocumentTokens, content: bytes) -> int:
    """Return how many tokens a text has as a document. Raises InvalidJob, ServiceBusy."""
    with contextlib.ExitStack() as turn, _invalid():
        if len(content) > _LONG_BYTES:
            turn.enter_context(_turn(BUILD_WAIT_S))
        text = decode_document(content)
        return len(runtime.tokenizer.encode_literal(text, documents.place(), MAX_UINT32))


@contextlib.contextmanager
def _invalid() -> Iterator[None]:
    """Turn what is wrong with a text into an error of the request."""
    try:
        yield
    except RendererBusy as error:
        raise ServiceBusy(str(error), 5.0) from error
    except UserError as error:
        if isinstance(error, InvalidJob):
            raise
        raise _refusal(error) from error


def _refusal(error: UserError) -> InvalidJob:
    """Return what is wrong with a text as an error of the request."""
    kind = ContextTooLong if isinstance(error, (ContextTooLong, PromptTooLong, TooManyTokens)) else InvalidJob
    return kind(one_line(error))


def _job_prompts(
    runtime: ClusterRuntime, documents: DocumentTokens, spec: JobSpec, now: datetime | None,
    begin: Callable[[int], None],
) -> list[array[int]]:  # fmt: skip
    """Build the prompts; `begin` is called with the characters or bytes of the text before it is read."""
    source = spec.input

    def check(size: int) -> None:
        check_text(runtime, size)
        begin(size)

    try:
        if source.document_id:
            ids = partial(documents.ids, source.document_id, check_size=check)
            prompts = runtime.document_prompts(ids, source.questions or (_READ,), spec.ask, now)
        elif source.messages is not None:
            begin(sum(map(len, chat_texts(source.messages, source.tools))))
            prompts = [_chat_prompt(runtime, source, spec, now)]
        elif source.prompt is not None:
            begin(len(source.prompt))
            prompts = [runtime.text_prompt(source.prompt)]
        else:
            prompts = [list(source.token_ids or ())]
        runtime.check_prompts(prompts, spec.ask)
        if spec.prompt_logprobs is not None and max(map(len, prompts)) > MAX_SCORED_TOKENS:
            most = f"must be at most {MAX_SCORED_TOKENS} for log-probabilities of a prompt"
            raise InvalidJob(f"prompt: {max(map(len, prompts))} tokens: {most}")
    except (RendererBusy, CompilerBusy) as error:
        raise ServiceBusy(str(error), 5.0) from error
    except UserError as error:
        raise _refusal(error) from error
    return [array("I", prompt) for prompt in prompts]


def _chat_prompt(runtime: ClusterRuntime, source: JobInput, spec: JobSpec, now: datetime | None) -> list[int]:
    choice = source.tool_choice.mode if source.tools else None
    if choice in ("required", "named") and runtime.tool_format is ToolFormat.NONE:
        raise InvalidJob(f"tool_choice: {choice}: the model has no form of tool calls: set model.tool_parser")
    return runtime.chat_prompt(source.messages or (), spec.ask, now, source.tools, choice)


def constrain_calls(runtime: ClusterRuntime, spec: JobSpec) -> JobSpec:
    """Return a submission whose answer is constrained to the calls that its tools ask for (InvalidJob)."""
    source = spec.input
    if not source.tools or spec.ask.structured_outputs is not None:
        return spec
    try:
        grammar = runtime.call_grammar(source.tools, source.tool_choice)
        constraint = Constraint("grammar", grammar) if grammar is not None else None
    except UserError as error:
        raise InvalidJob(one_line(error)) from error
    return replace(spec, ask=replace(spec.ask, structured_outputs=constraint))


def stored_clock(now: datetime) -> Mapping[str, str]:
    """Return what is stored of the clock with a job: the local time, without a zone, as chat templates show it."""
    return {_CLOCK: now.replace(tzinfo=None).isoformat()}


def clock_of(record: JobRecord) -> datetime:
    """Return what the clock of the chat template said when a job was submitted."""
    text = record.reproducibility.get(_CLOCK)
    return datetime.fromisoformat(text) if text else datetime.fromtimestamp(record.created)


def reasoning_opened(runtime: ClusterRuntime, spec: JobSpec, question: int) -> bool:
    """Return whether the prompt of a question ends inside `<think>`, though its document may be gone."""
    source = spec.input
    try:
        if source.document_id:
            values = {"{document}": "document", "{question}": (source.questions or (_READ,))[question]}
            content = runtime.deployment.config.model.document_prompt
            for name, value in values.items():
                content = content.replace(name, value)
            prompt = runtime.tokenizer.encode(render_user_message(runtime.tokenizer, content, spec.ask.enable_thinking))
        elif source.messages is not None:
            prompt = _chat_prompt(runtime, source, spec, None)
        elif source.prompt is not None:
            prompt = runtime.tokenizer.encode(source.prompt)
        else:
            prompt = list(source.token_ids or ())
        return opens_reasoning(runtime.tokenizer, prompt)
    except UserError:  # another model than the job was submitted to: without tokenizer, or with another template
        return False
