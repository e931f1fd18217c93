"""Completions of raw prompts: texts, in which control tokens may be spelt, or token ids."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from cluster.engine.outputs import OutputToken
from cluster.http.answers import Answer, finish_reason, spelling, total_usage
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.calls import call_of
from cluster.http.core.errors import refuse, to_api_error
from cluster.http.core.following import EventStream, JobEvents, check_outcome, collect, merge, submit_all
from cluster.http.core.sse import error_event, event
from cluster.http.openai.chat import body_of
from cluster.http.openai.chat_request import StreamOptions
from cluster.http.options import (
    AnswerFields,
    answer_options,
    check_model,
    check_supported,
    choices_of,
    job_fields,
    num_choices,
)
from cluster.jobs.model import JobInput, JobSpec, PromptToken
from cluster.text.detokenizer import IncrementalDecoder
from protos.jobs import validate

PARAMS = {"token_ids": "prompt"}  # fields by the names that messages of the job service begin with
_MAX_PROMPTS = 64  # of one request
_MAX_LOGPROBS = 20


class CompletionRequest(AnswerFields):
    """`POST /v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="A text or token ids, or several of them."
    )
    max_tokens: int | None = Field(None, description="Default: all that fits, up to server.http_max_tokens.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    prompt_embeds: Any = None
    prompt_logprobs: int | None = None

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, one or several."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt

    @property
    def is_scored(self) -> bool:
        """Whether the tokens of the prompt come with log-probabilities."""
        return bool(self.echo) and self.logprobs is not None

    @property
    def is_echo_alone(self) -> bool:
        """Whether nothing but the prompt is asked for; one token is computed all the same, and not shown."""
        return bool(self.echo) and self.max_tokens == 0


def make_router(backend: Backend) -> APIRouter:
    """Return the routes of completions."""
    router = APIRouter()

    @router.post("/v1/completions", summary="Continue raw prompts.", openapi_extra=body_of(CompletionRequest))
    async def complete(request: Request) -> Response:
        call_of(request).become_stream()
        asked = await read_model(backend, request, CompletionRequest)
        try:
            jobs = await submit_all(backend, request, partial(completion_specs, backend, asked))
        except Exception as error:
            raise to_api_error(error, PARAMS) from error
        choices = [Choice(backend, asked, index, job) for index, job in enumerate(jobs)]
        answer = Completion(backend, asked, choices)
        if asked.stream:
            return EventStream(answer.stream(), error_event)
        return JSONResponse(await collect(request, answer.whole()))

    return router


def completion_specs(backend: Backend, request: CompletionRequest) -> list[JobSpec]:
    """Return a job for each answer, those to one prompt together. Raises ApiError, InvalidRequest."""
    check_model(backend, request.model)
    count = num_choices(request)
    check_supported(request.model_copy(update={"n": None}))
    prompts = request.prompts
    if not prompts or not all(prompts):
        raise refuse("prompt", "empty: must have at least one character or token")
    validate.check_count("prompt", len(prompts), _MAX_PROMPTS)
    if len(prompts) * count > _MAX_PROMPTS:
        raise refuse("n", f"{count}: with {len(prompts)} prompts: must be at most {_MAX_PROMPTS} answers together")
    if request.logprobs is not None:
        validate.check_integer("logprobs", request.logprobs, 0, _MAX_LOGPROBS)
    if request.is_scored and request.stream:
        raise refuse("stream", "true: is not supported with echo and logprobs", "unsupported_value")
    most = 1 if request.is_echo_alone else request.max_tokens
    options = answer_options(request, most, request.logprobs, None, backend.limits.http_max_tokens)
    more = {
        "attached": True, "shorten": request.max_tokens is None,
        "prompt_logprobs": request.logprobs if request.is_scored else None, **job_fields(request),
    }  # fmt: skip
    return [one for prompt in prompts for one in choices_of(JobSpec(_input(prompt), options, **more), count)]


def _input(prompt: str | list[int]) -> JobInput:
    if isinstance(prompt, str):
        return JobInput(prompt=validate.check_text("prompt", prompt))
    return JobInput(token_ids=tuple(validate.check_token_ids("prompt", prompt)))


class Choice:
    """One answer to a prompt."""

    def __init__(self, backend: Backend, asked: CompletionRequest, index: int, job: JobEvents) -> None:
        self.index = index
        self.job = job
        self.answer = Answer()
        self._backend = backend
        self._asked = asked
        self._offset = 0  # characters of the answer so far

    def prompt_text(self) -> str:
        """Return the prompt, where it is to be repeated."""
        if not self._asked.echo:
            return ""
        prompt = self._asked.prompts[self.index // num_choices(self._asked)]
        return prompt if isinstance(prompt, str) else self._backend.runtime.tokenizer.decode(prompt, skip_special=False)

    async def run(self) -> AsyncIterator[Sequence[OutputToken] | None]:
        """Yield tokens as they come, None where there are no new ones. Raises ApiError: the answer failed."""
        async for news in self.job.events():
            if isinstance(news, Sequence) and not self._asked.is_echo_alone:
                self.answer.add(news, keep=not self._asked.stream)
                yield news
            else:
                yield None
        check_outcome(self.job.record)

    def show(self, text: str, tokens: Sequence[OutputToken], ended: bool) -> dict[str, Any]:
        """Return the choice, or a part of it."""
        finish = finish_reason(self.job.record) if ended else None
        finish = "length" if ended and self._asked.is_echo_alone else finish
        return {"index": self.index, "text": text, "logprobs": self._logprobs(tokens), "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[OutputToken]) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        tokenizer = self._backend.runtime.tokenizer
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        prompt = self.job.record.answers[0].prompt if self._asked.is_scored else ()
        shown: Sequence[OutputToken | PromptToken] = [*prompt, *tokens]
        sizes = [*self._sizes(prompt), *(len(token.text) for token in tokens)]
        for token, size in zip(shown, sizes, strict=True):
            found["tokens"].append(spelling(tokenizer, token.token_id)[0])
            found["token_logprobs"].append(token.logprob)
            top = [(token.token_id, token.logprob), *token.top[: self._asked.logprobs]]
            by_text = {spelling(tokenizer, token_id)[0]: logprob for token_id, logprob in top}
            found["top_logprobs"].append(None if token.logprob is None else by_text)
            found["text_offset"].append(self._offset)
            self._offset += size
        return found

    def _sizes(self, prompt: Sequence[PromptToken]) -> Iterator[int]:
        """Yield how many characters of the prompt's text each of its tokens makes certain."""
        tokenizer = self._backend.runtime.tokenizer
        decoder = IncrementalDecoder(tokenizer)
        for token in prompt:
            is_special = tokenizer.is_special(token.token_id)
            text = (
                decoder.flush() + spelling(tokenizer, token.token_id)[0] if is_special else decoder.push(token.token_id)
            )
            yield len(text)


class Completion:
    """The answers to all prompts of a request, in the form of the protocol."""

    def __init__(self, backend: Backend, asked: CompletionRequest, choices: Sequence[Choice]) -> None:
        self._backend = backend
        self._asked = asked
        self._choices = choices
        record = choices[0].job.record
        self._base = {
            "id": f"cmpl-{record.id.removeprefix('job_')}", "object": "text_completion",
            "created": int(record.created), "model": backend.model,
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """Return the answers once all have ended. Raises ApiError: one failed."""
        shown = []
        for choice in self._choices:
            async for _ in choice.run():
                pass
            tokens = choice.answer.tokens
            text = choice.prompt_text() + "".join(token.text for token in tokens)
            shown.append(await self._backend.call(choice.show, text, tokens, True))  # a prompt may have many tokens
        return {**self._base, "choices": shown, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the answers as they come, b"" where there is nothing new. Raises ApiError: one failed."""
        async for piece in merge([self._stream(choice) for choice in self._choices]):
            yield piece
        if self._asked.stream_options is not None and self._asked.stream_options.include_usage:
            yield event({**self._base, "choices": [], "usage": self._usage()})

    async def _stream(self, choice: Choice) -> AsyncIterator[bytes]:
        if prompt := choice.prompt_text():
            yield self._chunk(choice.show(prompt, (), False))
        async for tokens in choice.run():
            shown = [token for token in tokens or () if token.text or self._asked.logprobs is not None]
            yield b"".join(self._chunk(choice.show(token.text, [token], False)) for token in shown)
        yield self._chunk(choice.show("", (), True))

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        return event({**self._base, "choices": [choice]})

    def _usage(self) -> dict[str, Any]:
        each = num_choices(self._asked)
        return total_usage(
            choice.answer.usage(choice.job.record, counts_prompt=choice.index % each == 0) for choice in self._choices
        )
