"""The served model, and its tokens: `/v1/models`, `/tokenize`, `/detokenize`."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import FailFast, Field

from cluster.engine.runtime import check_ids
from cluster.http.core.backend import Backend
from cluster.http.core.body import read_model
from cluster.http.core.errors import refuse
from cluster.http.openai.chat import body_of
from cluster.http.openai.chat_request import RequestMessage, ToolFields, conversation
from cluster.http.options import RequestModel, check_model
from protos.jobs import validate
from protos.jobs.limits import MAX_TOKEN_IDS
from protos.jobs.sampling import AnswerOptions


class TokenizeRequest(ToolFields):
    """`POST /tokenize`: a raw prompt, or messages under the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[RequestMessage] | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(RequestModel):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()] = Field(description="Token ids.")


def make_router(backend: Backend) -> APIRouter:
    """Return the routes."""
    router = APIRouter()
    created = int(time.time())

    def entry() -> dict[str, Any]:
        return {
            "id": backend.model, "object": "model", "created": created, "owned_by": "longreach", "root": backend.model,
            "parent": None, "max_model_len": backend.runtime.max_model_len,
        }  # fmt: skip

    @router.get("/v1/models", summary="List the served model.")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry()]}

    @router.get("/v1/models/{model:path}", summary="Describe a model.")
    async def model(model: str) -> dict[str, Any]:
        check_model(backend, model)
        return entry()

    @router.post("/tokenize", summary="Turn a prompt into token ids.", openapi_extra=body_of(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        asked = await read_model(backend, request, TokenizeRequest)
        return await backend.call(_tokenize, backend, asked)

    @router.post("/detokenize", summary="Turn token ids into text.", openapi_extra=body_of(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, str]:
        asked = await read_model(backend, request, DetokenizeRequest)
        return {"prompt": await backend.call(_detokenize, backend, asked)}

    return router


def _tokenize(backend: Backend, asked: TokenizeRequest) -> dict[str, Any]:
    check_model(backend, asked.model)
    runtime = backend.runtime
    if (asked.prompt is None) == (asked.messages is None):
        raise refuse("prompt", "must be given, or messages, and not both")
    if asked.messages is not None:
        thinking = (asked.chat_template_kwargs or {}).get("enable_thinking")
        options = AnswerOptions(enable_thinking=thinking if isinstance(thinking, bool) else None)
        source = conversation(asked.messages, asked)
        choice = source.tool_choice.mode if source.tools else None
        ids = runtime.chat_prompt(source.messages or (), options, tools=source.tools, tool_choice=choice)
    else:
        ids = runtime.text_prompt(validate.check_text("prompt", asked.prompt))
    strings = [runtime.tokenizer.id_to_token(i) for i in ids] if asked.return_token_strs else None
    return {"count": len(ids), "max_model_len": runtime.max_model_len, "tokens": ids, "token_strs": strings}


def _detokenize(backend: Backend, asked: DetokenizeRequest) -> str:
    check_model(backend, asked.model)
    validate.check_count("tokens", len(asked.tokens), MAX_TOKEN_IDS)
    check_ids(asked.tokens, backend.runtime.deployment.spec.vocab_size, "tokens")
    return backend.runtime.tokenizer.decode(asked.tokens, skip_special=False)
