"""OpenAI's own client: chat, completions, models, responses, files and batches."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from tests.support.data.clients import look_up
from tests.support.data.clients.batch_lines import chat
from tests.support.rigs.background import BackgroundReader
from tests.support.rigs.head import until

TOOLS: Any = [look_up.TOOL]
NAMED: Any = look_up.NAMED
ASK: Any = look_up.ASK
ASK_WITH_TEXT: Any = look_up.ASK_WITH_TEXT
FLAT: Any = [{"type": "function", **look_up.FUNCTION, "strict": True}]


class Found(BaseModel):
    """What an answer must be like."""

    river: Literal["dark river"]
    is_secret: Literal[True]


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="needle", messages=ASK_WITH_TEXT, logprobs=True, top_logprobs=2)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (look_up.ANSWER, "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content[:-1]) == look_up.ANSWER
    assert {len(entry.top_logprobs) for entry in choice.logprobs.content} == {2}
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens == look_up.ANSWER_TOKENS
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_of_a_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="needle", messages=ASK_WITH_TEXT, stream=True, stream_options={"include_usage": True}
    )
    first, *chunks = stream
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == look_up.ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == look_up.ANSWER_TOKENS
    with client.chat.completions.stream(model="needle", messages=ASK_WITH_TEXT) as helper:
        assert "".join(event.delta for event in helper if event.type == "content.delta") == look_up.ANSWER


def test_asyncio(url: str) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole, parts, response = await asyncio.gather(
                client.chat.completions.create(model="needle", messages=ASK_WITH_TEXT),
                client.chat.completions.create(model="needle", messages=ASK_WITH_TEXT, stream=True),
                client.responses.create(model="needle", input=look_up.RESULT, stream=True),
            )
            chunks = [chunk.choices[0].delta.content or "" async for chunk in parts]
            deltas = [event.delta async for event in response if event.type == "response.output_text.delta"]
            return [whole.choices[0].message.content, "".join(chunks), "".join(deltas)]

    assert asyncio.run(run()) == [look_up.ANSWER] * 3


def test_completions_and_models(client: openai.OpenAI) -> None:
    prompt = f"{look_up.RESULT}\nAnswer:"
    answer = client.completions.create(model="needle", prompt=[prompt, prompt], logprobs=1)
    assert [choice.text for choice in answer.choices] == [look_up.ANSWER] * 2
    parts = [chunk.choices[0].text for chunk in client.completions.create(model="needle", prompt=prompt, stream=True)]
    assert "".join(parts) == look_up.ANSWER
    assert [model.id for model in client.models.list()] == ["needle"]
    assert client.models.retrieve("needle").max_model_len == 40_000  # type: ignore[attr-defined]


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_turn_with_tools(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"model": "needle", "messages": ASK, "tools": TOOLS, "parallel_tool_calls": False}
    made = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
    assert made.finish_reason == "tool_calls"
    (call,) = made.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (look_up.NAME, look_up.ARGUMENTS)
    with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls is not None
    assert streamed.message.tool_calls[0].id not in ("", call.id)
    assert json.loads(streamed.message.tool_calls[0].function.arguments) == look_up.ARGUMENTS
    result = {"role": "tool", "tool_call_id": call.id, "content": look_up.RESULT}
    history: Any = [*ASK, made.message.model_dump(exclude_unset=True), result]
    answer = client.chat.completions.create(model="needle", messages=history, tools=TOOLS)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (look_up.ANSWER, "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens


def test_a_format(client: openai.OpenAI) -> None:
    parsed = client.chat.completions.parse(model="needle", messages=ASK, response_format=Found)
    assert parsed.choices[0].message.parsed == Found(river="dark river", is_secret=True)
    response = client.responses.parse(model="needle", input=look_up.QUESTION, text_format=Found)
    assert response.output_parsed == Found(river="dark river", is_secret=True)


def test_a_response_and_the_next(client: openai.OpenAI) -> None:
    made = client.responses.create(model="needle", input=look_up.RESULT, instructions="Find codes.")
    assert (made.status, made.output_text) == ("completed", look_up.ANSWER)
    assert made.usage is not None
    assert made.usage.output_tokens == look_up.ANSWER_TOKENS
    assert client.responses.retrieve(made.id).output_text == look_up.ANSWER
    events = list(client.responses.create(input=look_up.RESULT, previous_response_id=made.id, stream=True))
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    last: Any = events[-1]
    assert (last.type, last.response.output_text) == ("response.completed", look_up.ANSWER)


def test_a_response_in_the_background(client: openai.OpenAI) -> None:
    made = client.responses.create(model="needle", input=look_up.RESULT, background=True)
    assert made.status in ("queued", "in_progress")
    until(lambda: client.responses.retrieve(made.id).status == "completed")
    reader = BackgroundReader(client, made.id)
    reader.read()
    reader.check()
    assert reader.text == look_up.ANSWER
    rest = client.responses.retrieve(made.id, stream=True, starting_after=4)
    assert [event.to_dict() for event in rest] == reader.events[5:]
    client.responses.delete(made.id)


def test_a_turn_with_tools_in_responses(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "name": look_up.NAME}
    made = client.responses.create(input=look_up.QUESTION, tools=FLAT, tool_choice=named)
    call: Any = made.output[0]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", look_up.NAME, look_up.ARGUMENTS)
    with client.responses.stream(model="needle", input=look_up.QUESTION, tools=FLAT, tool_choice=named) as stream:
        streamed: Any = stream.get_final_response().output[0]
    assert (streamed.arguments, streamed.call_id != call.call_id) == (call.arguments, True)
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": look_up.RESULT}
    stored = client.responses.create(input=[result], previous_response_id=made.id, tools=FLAT)
    items: Any = [*ASK, *(item.to_dict() for item in made.output), result]
    whole = client.responses.create(input=items, tools=FLAT, store=False)
    assert [stored.output_text, whole.output_text] == [look_up.ANSWER] * 2


def test_a_file_is_asked(client: openai.OpenAI) -> None:
    file = client.files.create(file=("codes.txt", look_up.RESULT.split("\n")[0].encode()), purpose="user_data")
    part: Any = {"type": "file", "file": {"file_id": file.id}}
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": look_up.QUESTION}]}]
    answer = client.chat.completions.create(model="needle", messages=messages)
    items: Any = [{"type": "input_file", "file_id": file.id}, {"type": "input_text", "text": look_up.QUESTION}]
    response = client.responses.create(model="needle", input=[{"role": "user", "content": items}])
    assert [answer.choices[0].message.content, response.output_text] == [look_up.ANSWER] * 2
    assert client.files.delete(file.id).deleted


def test_a_batch(client: openai.OpenAI) -> None:
    lines = "\n".join(json.dumps(chat(f"c{n}", look_up.RESULT, max_tokens=40)) for n in range(2))
    file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
    made = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    until(lambda: client.batches.retrieve(made.id).status == "completed", "a batch that is completed")
    output = client.batches.retrieve(made.id).output_file_id
    assert output is not None
    found = [json.loads(line) for line in client.files.content(output).text.splitlines()]
    assert [line["custom_id"] for line in found] == ["c0", "c1"]
    assert {line["response"]["body"]["choices"][0]["message"]["content"] for line in found} == {look_up.ANSWER}
