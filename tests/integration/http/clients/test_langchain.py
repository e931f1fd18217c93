"""LangChain's client of OpenAI: chat and responses, streams, tools and structured output."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from tests.support.data.clients import look_up

langchain_openai = pytest.importorskip("langchain_openai", reason="comes with the extra clients")
messages = pytest.importorskip("langchain_core.messages")


class Found(BaseModel):
    """What an answer must be like."""

    river: Literal["dark river"]
    limit: int = Field(ge=1, le=1)


def model_of(url: str, responses: bool) -> Any:
    return langchain_openai.ChatOpenAI(
        model="needle", base_url=f"{url}/v1", api_key="none", max_retries=0, use_responses_api=responses,
        stream_usage=True,
    )  # fmt: skip


@pytest.fixture(params=[False, True], ids=["chat", "responses"])
def model(url: str, request: pytest.FixtureRequest) -> Any:
    return model_of(url, request.param)


def test_invoke_and_stream(model: Any) -> None:
    whole = model.invoke(look_up.RESULT)
    assert whole.text == look_up.ANSWER
    assert whole.usage_metadata["output_tokens"] == look_up.ANSWER_TOKENS
    first, *others = model.stream(look_up.RESULT)
    for chunk in others:
        first += chunk
    assert first.text == look_up.ANSWER
    assert first.usage_metadata["output_tokens"] == look_up.ANSWER_TOKENS


def test_asyncio(url: str) -> None:
    async def run() -> list[str]:  # in one event loop: the client keeps its connections
        texts = []
        for model in (model_of(url, False), model_of(url, True)):
            texts.append((await model.ainvoke(look_up.RESULT)).text)
            texts.append("".join([chunk.text async for chunk in model.astream(look_up.RESULT)]))
        return texts

    assert asyncio.run(run()) == [look_up.ANSWER] * 4


@pytest.mark.parametrize("choice", [look_up.NAME, "required"])
def test_a_turn_with_tools(model: Any, choice: str) -> None:
    forced = model.bind_tools([look_up.TOOL], tool_choice=choice, parallel_tool_calls=False)
    made = forced.invoke(look_up.QUESTION)
    (call,) = made.tool_calls
    assert (call["name"], call["args"]) == (look_up.NAME, look_up.ARGUMENTS)
    first, *others = forced.stream(look_up.QUESTION)
    for chunk in others:
        first += chunk
    assert [(found["name"], found["args"]) for found in first.tool_calls] == [(look_up.NAME, look_up.ARGUMENTS)]
    assert first.tool_calls[0]["id"] not in (None, call["id"])
    result = messages.ToolMessage(look_up.RESULT, tool_call_id=call["id"])
    answer = model.bind_tools([look_up.TOOL]).invoke([messages.HumanMessage(look_up.QUESTION), made, result])
    assert (answer.text, answer.tool_calls) == (look_up.ANSWER, [])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(model: Any, method: str) -> None:
    found = model.with_structured_output(Found, method=method).invoke(look_up.QUESTION)
    assert found == Found(river="dark river", limit=1)
