"""Anthropic's messages: the routes, and the answer as one object or as a stream of events."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from cluster.engine.outputs import OutputToken
from cluster.http.answers import Answer, AnswerScanner, finish_reason
from cluster.http.anthropic.blocks import BlockWriter
from cluster.http.anthropic.messages_request import (
    MESSAGES_PARAMS,
    CountTokensRequest,
    MessagesRequest,
    messages_input,
    messages_spec,
    thinks,
)
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import to_api_error
from cluster.http.core.following import EventStream, JobEvents, check_outcome, collect, submit
from cluster.http.core.sse import named_event
from cluster.http.files.attachments import Documents
from cluster.http.openai.chat import body_of
from cluster.http.options import check_model
from cluster.jobs.model import JobAnswer
from protos.jobs.sampling import AnswerOptions

PING = named_event({"type": "ping"})
_PATH = "/v1/messages"
_SPARE_TOKENS = 8  # more than a stop sequence has tokens where each is one byte


def make_router(backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    @router.post(_PATH, summary="Answer a conversation (Anthropic).", openapi_extra=body_of(MessagesRequest))
    async def create(request: Request) -> Response:
        call = call_of(request)
        call.become_stream()
        asked = await read_model(backend, request, MessagesRequest)
        try:
            job = await submit(backend, request, partial(messages_spec, backend, asked, call.service.documents))
        except Exception as error:
            raise to_api_error(error, MESSAGES_PARAMS) from error
        answer = MessageAnswer(backend, asked, job)
        if asked.stream:
            return EventStream(answer.stream(), _error_event, b"", PING)
        return JSONResponse(await collect(request, answer.whole()))

    @router.post(
        f"{_PATH}/count_tokens", summary="Count the tokens of a prompt.", openapi_extra=body_of(CountTokensRequest)
    )
    async def count(request: Request) -> dict[str, int]:
        asked = await read_model(backend, request, CountTokensRequest)
        try:
            return {"input_tokens": await backend.call(_count, backend, asked, call_of(request).service.documents)}
        except Exception as error:
            raise to_api_error(error, MESSAGES_PARAMS) from error

    return router


def _count(backend: Backend, asked: CountTokensRequest, documents: Documents) -> int:
    check_model(backend, asked.model)
    source = messages_input(asked, documents)
    choice = source.tool_choice.mode if source.tools else None
    options = AnswerOptions(enable_thinking=thinks(asked))
    return len(backend.runtime.chat_prompt(source.messages or (), options, tools=source.tools, tool_choice=choice))


def _error_event(error: Exception) -> bytes:
    return named_event(to_api_error(error, MESSAGES_PARAMS).body_for(_PATH))


class MessageAnswer:
    """The answer of one job in the form of the protocol."""

    def __init__(self, backend: Backend, asked: MessagesRequest, job: JobEvents) -> None:
        self._backend = backend
        self._asked = asked
        self._job = job
        self._answer = Answer()
        source, answer_id = job.record.spec.input, job.record.id.removeprefix("job_")
        self._scanner = AnswerScanner(backend.runtime.tool_format, source.tools, source.tool_choice)
        self._blocks = BlockWriter(answer_id)
        self._base = {
            "id": f"msg_{answer_id}", "type": "message", "role": "assistant", "model": backend.model,
        }  # fmt: skip
        longest = max(map(len, (stop.encode() for stop in job.record.spec.ask.stop)), default=0)
        self._newest: deque[int] = deque(maxlen=longest + _SPARE_TOKENS)  # tokens, with what a stop sequence cuts off

    async def whole(self) -> dict[str, Any]:
        """Return the answer once it has ended. Raises ApiError: it failed."""
        async for _ in self._events():
            pass
        return {**self._base, "content": self._blocks.blocks, **self._end(), "usage": self._usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the answer as it comes, b"" where there is nothing new. Raises ApiError: it failed."""
        usage = {"input_tokens": 0, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}
        begun: dict[str, Any] = {
            **self._base,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield named_event({"type": "message_start", "message": begun}) + PING
        async for piece in self._events():
            yield piece
        shown = {"type": "message_delta", "delta": self._end(), "usage": self._usage()}
        yield named_event(shown) + named_event({"type": "message_stop"})

    async def _events(self) -> AsyncIterator[bytes]:
        """Yield the events of the content. Raises ApiError: the answer failed."""
        async for news in self._job.events():
            if isinstance(news, Sequence):
                self._answer.add(news, keep=False)
                yield b"".join(map(self._token, news))
            else:
                yield b""
        check_outcome(self._job.record)
        yield self._blocks.take(self._scanner.flush()) + self._blocks.end()

    def _token(self, token: OutputToken) -> bytes:
        self._newest.append(token.token_id)
        return self._blocks.think(token.reasoning) + self._blocks.take(self._scanner.push(token.answer))

    def _end(self) -> dict[str, Any]:
        """Return why the answer ended."""
        record = self._job.record
        if finish_reason(record) == "length":
            is_full = record.spec.ask.max_tokens < self._asked.max_tokens
            return _stopped("model_context_window_exceeded" if is_full else "max_tokens")
        if self._scanner.found.calls:
            return _stopped("tool_use")
        if (stop := self._matched(record.spec.ask.stop)) is not None:
            return _stopped("stop_sequence", stop)
        return _stopped("end_turn")

    def _matched(self, stops: Sequence[str]) -> str | None:
        """Return the stop sequence at the end of the newest tokens, which the text does not have any more."""
        if not stops:
            return None
        decode = partial(self._backend.runtime.tokenizer.decode, skip_special=False)
        ids = [*self._newest]
        text, before = decode(ids), len(decode(ids[:-1]))
        found = {stop: text.find(stop, max(0, before - len(stop))) for stop in stops}
        return min((stop for stop, at in found.items() if at >= 0), key=lambda stop: found[stop], default=None)

    def _usage(self) -> dict[str, int]:
        answer = self._job.record.answers[0]
        created = self._protected_tokens(answer)
        return {
            "input_tokens": answer.prompt_tokens - answer.cached_tokens - created,
            "cache_creation_input_tokens": created, "cache_read_input_tokens": answer.cached_tokens,
            "output_tokens": self._answer.num_tokens,
        }  # fmt: skip

    def _protected_tokens(self, answer: JobAnswer) -> int:
        """Return how many tokens were computed whose KV is to be stored and protected: whole blocks, if asked for."""
        block = self._backend.runtime.kv_store.block_tokens
        if not block or not self._job.record.spec.cache_ttl_s:
            return 0
        return max(0, answer.prompt_tokens // block * block - answer.cached_tokens)


def _stopped(reason: str, sequence: str | None = None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": sequence}
