"""LiteLLM: chat by each of the providers that reach a server of one's own, its responses and its messages."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.support.data.clients import look_up

litellm = pytest.importorskip("litellm", reason="comes with the extra clients")


class Found(BaseModel):
    """What an answer must be like."""

    river: Literal["dark river"]


@pytest.fixture
def asked(url: str) -> dict[str, Any]:
    litellm.telemetry = False
    return {"model": "openai/needle", "api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_a_completion(asked: dict[str, Any], provider: str) -> None:
    asked["model"] = f"{provider}/needle"
    whole = litellm.completion(**asked, messages=look_up.ASK_WITH_TEXT, stream_options={"include_usage": True})
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (look_up.ANSWER, "stop")
    assert whole.usage.completion_tokens == look_up.ANSWER_TOKENS
    chunks = list(
        litellm.completion(
            **asked, messages=look_up.ASK_WITH_TEXT, stream=True, stream_options={"include_usage": True},
            logprobs=True, top_logprobs=1,
        )
    )  # fmt: skip
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == look_up.ANSWER
    assert [r for chunk in chunks if chunk.choices and (r := chunk.choices[0].finish_reason)] == ["stop"]
    built = litellm.stream_chunk_builder(chunks)
    assert built.usage.prompt_tokens == whole.usage.prompt_tokens
    assert built.usage.completion_tokens == look_up.ANSWER_TOKENS


def test_asyncio(asked: dict[str, Any]) -> None:
    async def run() -> list[str]:
        whole = await litellm.acompletion(**asked, messages=look_up.ASK_WITH_TEXT)
        stream = await litellm.acompletion(**asked, messages=look_up.ASK_WITH_TEXT, stream=True)
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return [whole.choices[0].message.content, "".join(parts)]

    assert asyncio.run(run()) == [look_up.ANSWER] * 2


def test_a_turn_with_tools(asked: dict[str, Any]) -> None:
    forced = {**asked, "messages": look_up.ASK, "tools": [look_up.TOOL], "tool_choice": look_up.NAMED}
    made = litellm.completion(**forced).choices[0]
    assert made.finish_reason == "tool_calls"
    (call,) = made.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (look_up.NAME, look_up.ARGUMENTS)
    built = litellm.stream_chunk_builder(list(litellm.completion(**forced, stream=True))).choices[0]
    assert built.finish_reason == "tool_calls"
    assert json.loads(built.message.tool_calls[0].function.arguments) == look_up.ARGUMENTS
    assert built.message.tool_calls[0].id.startswith("call_")
    result = {"role": "tool", "tool_call_id": call.id, "name": look_up.NAME, "content": look_up.RESULT}
    history = [*look_up.ASK, made.message, result]
    answer = litellm.completion(**asked, messages=history, tools=[look_up.TOOL])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (look_up.ANSWER, "stop")


def test_a_format(asked: dict[str, Any]) -> None:
    answer = litellm.completion(**asked, messages=look_up.ASK, response_format=Found)
    assert Found.model_validate_json(answer.choices[0].message.content) == Found(river="dark river")


def test_responses(asked: dict[str, Any]) -> None:
    whole = litellm.responses(**asked, input=look_up.RESULT)
    assert whole.output[0].content[0].text == look_up.ANSWER
    assert (whole.status, whole.usage.output_tokens) == ("completed", look_up.ANSWER_TOKENS)
    events = list(litellm.responses(**asked, input=look_up.RESULT, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == look_up.ANSWER
    assert events[-1].type == "response.completed"


def test_messages_of_anthropic(asked: dict[str, Any], url: str) -> None:
    """Translated by LiteLLM to the chat of OpenAI, and passed on to our own route."""
    asked |= {"model": "anthropic/needle", "api_base": url}
    tools = {"tools": [look_up.TOOL], "tool_choice": look_up.NAMED}
    whole = litellm.completion(**asked, messages=look_up.ASK_WITH_TEXT, max_tokens=99)
    assert whole.choices[0].message.content == look_up.ANSWER
    assert whole.usage.completion_tokens == look_up.ANSWER_TOKENS
    built = litellm.stream_chunk_builder(
        list(litellm.completion(**asked, messages=look_up.ASK, max_tokens=99, stream=True, **tools))
    )
    assert json.loads(built.choices[0].message.tool_calls[0].function.arguments) == look_up.ARGUMENTS
    passed = asyncio.run(litellm.anthropic_messages(**asked, messages=look_up.ASK_WITH_TEXT, max_tokens=99))
    assert passed["content"][0]["text"] == look_up.ANSWER
