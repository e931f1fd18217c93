"""Chat completions: the route, and the answer as one object or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.http.answers import Answer, finish_reason, progress_text, spelling
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import to_api_error
from cluster.http.core.following import EventStream, JobEvents, check_outcome, collect, submit
from cluster.http.core.sse import error_event, event
from cluster.http.openai.chat_request import ChatRequest, chat_params, chat_spec
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
            job = await submit(backend, request, partial(chat_spec, backend, asked, call.service.documents))
        except Exception as error:
            raise to_api_error(error, chat_params(asked)) from error
        chunks = ChatChunks(backend, asked, job)
        if asked.stream:
            return EventStream(chunks.stream(), error_event)
        return JSONResponse(await collect(request, chunks.whole()))

    return router


def body_of(model: type[Any]) -> dict[str, Any]:
    """Return how the OpenAPI document describes a body that a route reads itself."""
    reference = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


class ChatChunks:
    """The answer of one job in the form of the protocol."""

    def __init__(self, backend: Backend, asked: ChatRequest, job: JobEvents) -> None:
        self._backend = backend
        self._asked = asked
        self._job = job
        self._answer = Answer()
        self._fields = REASONING_FIELDS[backend.limits.http_reasoning_field]
        self._base = {
            "id": f"chatcmpl-{job.record.id.removeprefix('job_')}", "created": int(job.record.created),
            "model": backend.model,
        }  # fmt: skip
        source = job.record.spec.input
        answer_id = job.record.id.removeprefix("job_")
        self._calls = CallWriter(backend.runtime.tool_format, source.tools, source.tool_choice, answer_id)
        self._began = time.monotonic()
        self._next_line = 0.0  # when progress may be told again as text

    async def whole(self) -> dict[str, Any]:
        """Return the answer once it has ended. Raises ApiError: it failed."""
        async for news in self._job.events():
            if isinstance(news, Sequence):
                self._answer.add(news, keep=True)
        check_outcome(self._job.record)
        tokens = self._answer.tokens
        self._calls.push("".join(token.answer for token in tokens))
        self._calls.flush()
        message = {"role": "assistant", **self._calls.message()}
        message |= self._reasoning("".join(token.reasoning for token in tokens))
        choice = {
            "index": 0, "message": message, "logprobs": self._logprobs(tokens),
            "finish_reason": self._finish_reason(),
        }  # fmt: skip
        usage = self._answer.usage(self._job.record)
        return {**self._base, "object": "chat.completion", "choices": [choice], "usage": usage}

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the answer as it comes, b"" where there is nothing new. Raises ApiError: it failed."""
        yield self._chunk({"role": "assistant", "content": ""})
        async for news in self._job.events():
            if isinstance(news, Sequence):
                self._answer.add(news, keep=False)
                yield b"".join(map(self._token, news))
            elif isinstance(news, ProgressUpdate):
                yield self._progress(news.progress)
            else:
                yield b""
        check_outcome(self._job.record)
        yield b"".join(self._chunk(delta) for delta in self._calls.flush())
        yield self._chunk({}, finish=self._finish_reason())
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield event(self._base | {
                "object": "chat.completion.chunk", "choices": [], "usage": self._answer.usage(self._job.record),
            })  # fmt: skip

    def _token(self, token: OutputToken) -> bytes:
        deltas = [delta for delta in (self._reasoning(token.reasoning), *self._calls.push(token.answer)) if delta]
        logprobs = self._logprobs([token])
        if logprobs is None:
            return b"".join(map(self._chunk, deltas))
        first, *others = deltas or [{}]
        return self._chunk(first, logprobs=logprobs) + b"".join(map(self._chunk, others))

    def _finish_reason(self) -> str:
        return self._calls.finish_reason(finish_reason(self._job.record))

    def _progress(self, progress: PrefillProgress) -> bytes:
        if self._asked.return_progress == "reasoning":
            now = time.monotonic()
            if now < self._next_line:
                return b""
            self._next_line = now + _PROGRESS_TEXT_S
            return self._chunk(self._reasoning(progress_text(progress)))
        if not self._asked.return_progress:
            return b""
        elapsed_ms = round((time.monotonic() - self._began) * 1000)
        return self._chunk({}, prompt_progress={
            "total": progress.total, "cache": progress.cached, "processed": progress.processed,
            "time_ms": elapsed_ms, "eta_ms": progress.eta_ms,
        })  # fmt: skip

    def _chunk(
        self, delta: dict[str, Any], finish: str | None = None, logprobs: dict[str, Any] | None = None, **more: Any
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event(self._base | {"object": "chat.completion.chunk", "choices": [choice], **more})

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
