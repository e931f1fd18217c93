"""Chat completions: the route, and the answer as one object or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.http.answers import Answer, finish_reason, progress_text, spelling, total_usage
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import to_api_error
from cluster.http.core.following import EventStream, JobEvents, check_outcome, collect, merge, submit_all
from cluster.http.core.sse import error_event, event
from cluster.http.openai.chat_request import ChatRequest, chat_params, chat_specs
from cluster.http.openai.tool_calls import CallWriter
from cluster.jobs.subscriptions import ProgressUpdate
from protos.stage.messages import TokenLogprob

REASONING_FIELDS = {
    "both": ("reasoning", "reasoning_content"),
    "reasoning": ("reasoning",),
    "reasoning_content": ("reasoning_content",),
}
_PROGRESS_TEXT_S = 10.0  # between lines about progress in the reasoning text


def make_router(backend: Backend) -> APIRouter:
    """Return the routes of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", summary="Answer a conversation.", openapi_extra=body_of(ChatRequest))
    async def complete(request: Request) -> Response:
        call = call_of(request)
        call.become_stream()
        asked = await read_model(backend, request, ChatRequest)
        try:
            jobs = await submit_all(backend, request, partial(chat_specs, backend, asked, call.service.documents))
        except Exception as error:
            raise to_api_error(error, chat_params(asked)) from error
        answer = ChatCompletion(backend, asked, jobs)
        if asked.stream:
            return EventStream(answer.stream(), error_event)
        return JSONResponse(await collect(request, answer.whole()))

    return router


def body_of(model: type[Any]) -> dict[str, Any]:
    """Return how the OpenAPI document describes a body that a route reads itself."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


class ChatCompletion:
    """The answers to one conversation in the form of the protocol."""

    def __init__(self, backend: Backend, asked: ChatRequest, jobs: Sequence[JobEvents]) -> None:
        """Args: `jobs` have an answer each."""
        self._asked = asked
        first = jobs[0].record
        self._base = {
            "id": f"chatcmpl-{first.id.removeprefix('job_')}", "created": int(first.created), "model": backend.model,
        }  # fmt: skip
        chunk = self._base | {"object": "chat.completion.chunk"}
        self._choices = [ChatChoice(backend, asked, index, job, chunk) for index, job in enumerate(jobs)]

    async def whole(self) -> dict[str, Any]:
        """Return the answers once all have ended. Raises ApiError: one failed."""
        choices = [await choice.whole() for choice in self._choices]
        return {**self._base, "object": "chat.completion", "choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the answers as they come, b"" where there is nothing new. Raises ApiError: one failed."""
        yield b"".join(choice.chunk({"role": "assistant", "content": ""}) for choice in self._choices)
        async for piece in merge([choice.stream() for choice in self._choices]):
            yield piece
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield event({**self._base, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})

    def _usage(self) -> dict[str, Any]:
        return total_usage(choice.usage() for choice in self._choices)


class ChatChoice:
    """The answer of one job."""

    def __init__(
        self, backend: Backend, asked: ChatRequest, index: int, job: JobEvents, base: Mapping[str, Any]
    ) -> None:
        """Args: `base` is what every chunk has."""
        self._backend = backend
        self._asked = asked
        self._index = index
        self._job = job
        self._base = base
        self._answer = Answer()
        self._fields = REASONING_FIELDS[backend.limits.http_reasoning_field]
        source = job.record.spec.input
        answer_id = job.record.id.removeprefix("job_")
        self._calls = CallWriter(backend.runtime.tool_format, source.tools, source.tool_choice, answer_id)
        self._began = time.monotonic()
        self._next_line = 0.0  # when progress may be told again as text

    async def whole(self) -> dict[str, Any]:
        """Return the choice once its job has ended. Raises ApiError: it failed."""
        async for news in self._job.events():
            if isinstance(news, Sequence):
                self._answer.add(news, keep=True)
        check_outcome(self._job.record)
        tokens = self._answer.tokens
        self._calls.push("".join(token.answer for token in tokens))
        self._calls.flush()
        message = {"role": "assistant", **self._calls.message()}
        message |= self._reasoning("".join(token.reasoning for token in tokens))
        return {
            "index": self._index, "message": message, "logprobs": self._logprobs(tokens),
            "finish_reason": self._finish_reason(),
        }  # fmt: skip

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the chunks behind the first, b"" where there is nothing new. Raises ApiError: it failed."""
        async for news in self._job.events():
            if isinstance(news, Sequence):
                self._answer.add(news, keep=False)
                yield b"".join(map(self._token, news))
            elif isinstance(news, ProgressUpdate) and not self._index:  # the others wait for the same prompt
                yield self._progress(news.progress)
            else:
                yield b""
        check_outcome(self._job.record)
        yield b"".join(self.chunk(delta) for delta in self._calls.flush())
        yield self.chunk({}, finish=self._finish_reason())

    def usage(self) -> dict[str, Any]:
        """Return what the answer took, and for the first one what the prompt did."""
        return self._answer.usage(self._job.record, counts_prompt=not self._index)

    def _token(self, token: OutputToken) -> bytes:
        deltas = [delta for delta in (self._reasoning(token.reasoning), *self._calls.push(token.answer)) if delta]
        logprobs = self._logprobs([token])
        if logprobs is None:
            return b"".join(map(self.chunk, deltas))
        first, *others = deltas or [{}]
        return self.chunk(first, logprobs=logprobs) + b"".join(map(self.chunk, others))

    def _finish_reason(self) -> str:
        return self._calls.finish_reason(finish_reason(self._job.record))

    def _progress(self, progress: PrefillProgress) -> bytes:
        if self._asked.return_progress == "reasoning":
            now = time.monotonic()
            if now < self._next_line:
                return b""
            self._next_line = now + _PROGRESS_TEXT_S
            return self.chunk(self._reasoning(progress_text(progress)))
        if not self._asked.return_progress:
            return b""
        elapsed_ms = round((time.monotonic() - self._began) * 1000)
        return self.chunk({}, prompt_progress={
            "total": progress.total, "cache": progress.cached, "processed": progress.processed,
            "time_ms": elapsed_ms, "eta_ms": progress.eta_ms,
        })  # fmt: skip

    def chunk(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None, **more: Any
    ) -> bytes:
        """Return a chunk of the stream."""
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._base, "choices": [choice], **more})

    def _reasoning(self, text: str) -> dict[str, Any]:
        return dict.fromkeys(self._fields, text) if text else {}

    def _logprobs(self, tokens: Sequence[OutputToken]) -> dict[str, Any] | None:
        """Return the log-probabilities of tokens, of reasoning too; None if nobody asked for them."""
        if not self._asked.logprobs:
            return None

        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            text, raw = spelling(self._backend.runtime.tokenizer, token_id)
            return {"token": text, "logprob": logprob, "bytes": list(raw)}

        def top(found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
            return [entry(token_id, logprob) for token_id, logprob in found[: self._asked.top_logprobs or 0]]

        return {"content": [entry(t.token_id, t.logprob) | {"top_logprobs": top(t.top)} for t in tokens]}
