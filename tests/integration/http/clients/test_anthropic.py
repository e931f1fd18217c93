"""Anthropic's own client: messages, streams, tools, formats and counts of tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import pytest
from pydantic import BaseModel

from tests.support.data.clients import look_up

ASK: dict[str, Any] = {"model": "needle", "max_tokens": 200, "messages": look_up.ASK}
ASK_WITH_TEXT: dict[str, Any] = {**ASK, "messages": look_up.ASK_WITH_TEXT}
TOOL: Any = {"name": look_up.NAME, "description": "Find secret codes.", "input_schema": look_up.PARAMETERS}


class Found(BaseModel):
    """What an answer must be like."""

    river: Literal["dark river"]


@pytest.fixture
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_a_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**ASK_WITH_TEXT, system=[{"type": "text", "text": "Find codes."}])
    (block,) = answer.content
    assert (block.type, block.text, answer.stop_reason) == ("text", look_up.ANSWER, "end_turn")
    assert answer.usage.output_tokens == look_up.ANSWER_TOKENS
    counted = client.messages.count_tokens(model="needle", messages=look_up.ASK_WITH_TEXT, system="Find codes.")  # type: ignore[arg-type]
    cached = answer.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == answer.usage.input_tokens + cached
    stopped = client.messages.create(**ASK_WITH_TEXT, stop_sequences=["river"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "river")


def test_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ASK_WITH_TEXT) as stream:
        assert "".join(stream.text_stream) == look_up.ANSWER
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", look_up.ANSWER_TOKENS)
    kinds = [event.type for event in client.messages.create(**ASK_WITH_TEXT, stream=True)]
    assert (kinds[0], kinds[-3:]) == ("message_start", ["content_block_stop", "message_delta", "message_stop"])


def test_asyncio(url: str) -> None:
    async def run() -> list[str]:
        async with anthropic.AsyncAnthropic(base_url=url, auth_token="none", max_retries=0) as client:
            whole = await client.messages.create(**ASK_WITH_TEXT)
            async with client.messages.stream(**ASK_WITH_TEXT) as stream:
                return [whole.content[0].text, await stream.get_final_text()]  # type: ignore[union-attr]

    assert asyncio.run(run()) == [look_up.ANSWER] * 2


@pytest.mark.parametrize("choice", [{"type": "tool", "name": look_up.NAME}, {"type": "any"}])
def test_a_turn_with_tools(client: anthropic.Anthropic, choice: dict[str, Any]) -> None:
    forced: Any = {**ASK, "tools": [TOOL], "tool_choice": {**choice, "disable_parallel_tool_use": True}}
    made = client.messages.create(**forced)
    (call,) = made.content
    assert (made.stop_reason, call.type) == ("tool_use", "tool_use")
    assert (call.name, call.input) == (look_up.NAME, look_up.ARGUMENTS)
    with client.messages.stream(**forced) as stream:
        (streamed,) = stream.get_final_message().content
    assert (streamed.type, streamed.input, streamed.id != call.id) == ("tool_use", look_up.ARGUMENTS, True)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": look_up.RESULT}
    history: Any = [*look_up.ASK, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(model="needle", max_tokens=200, messages=history, tools=[TOOL])
    assert answer.content[0].text == look_up.ANSWER
    assert answer.stop_reason == "end_turn"
    assert answer.usage.cache_read_input_tokens


def test_a_format(client: anthropic.Anthropic) -> None:
    assert client.messages.parse(**ASK, output_format=Found).parsed_output == Found(river="dark river")
