"""OpenAI's own client makes, follows, resumes, cancels and forgets responses of a whole head over a fake shard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from cluster.jobs.model import JobState
from tests.support.data.clients.codex import first_request, request_after_calls
from tests.support.rigs.background import BackgroundReader, die_again_and_again, read_to_end
from tests.support.rigs.head import free_port, until
from tests.support.rigs.http import AnsweringService, serving_http
from tests.support.rigs.service import Bench

TOOLS: Any = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, http_port=free_port())
    yield made
    made.close()


@pytest.fixture
def client(bench: Bench) -> Iterator[openai.OpenAI]:
    url = f"{bench.service.http_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def job_of(bench: Bench, response: Any) -> Any:
    return bench.service.get(f"job_{response.id.removeprefix('resp_')}")


def test_one_object_and_its_input(client: openai.OpenAI) -> None:
    made = client.responses.create(model=client.models.list().data[0].id, input="hi", max_output_tokens=4)
    assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")  # type: ignore[union-attr]
    assert made.output_text
    assert made.usage is not None
    assert (made.usage.output_tokens, made.usage.total_tokens) == (4, made.usage.input_tokens + 4)
    again = client.responses.retrieve(made.id)
    assert again == made
    (item,) = client.responses.input_items.list(made.id).data
    assert item.to_dict()["content"] == [{"type": "input_text", "text": "hi"}]
    more = client.responses.create(input="and now?", previous_response_id=made.id, max_output_tokens=1)
    assert more.usage is not None
    assert more.usage.input_tokens > made.usage.total_tokens
    assert len(client.responses.input_items.list(more.id).data) == 3
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_a_stream_and_its_helper(client: openai.OpenAI) -> None:
    events = list(client.responses.create(input="hi", max_output_tokens=5, stream=True))
    assert [event.type for event in events][-1] == "response.incomplete"
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == text  # type: ignore[union-attr]
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(numbers)


def test_a_response_in_the_background(bench: Bench, client: openai.OpenAI) -> None:
    bench.runtime.shard.hold()
    raw = client.responses.with_raw_response.create(input="hi", max_output_tokens=6, background=True)
    made = raw.parse()
    assert made.status in ("queued", "in_progress")
    assert 500 <= int(raw.headers["openai-poll-after-ms"]) <= 30_000
    assert not client.responses.retrieve(made.id).output_text
    bench.runtime.shard.let(1000)
    until(lambda: client.responses.retrieve(made.id).status == "incomplete")
    reader = BackgroundReader(client, made.id)
    reader.read()
    reader.check()
    assert client.responses.retrieve(made.id).output_text == reader.text
    for after in range(len(reader.events)):
        rest = client.responses.retrieve(made.id, stream=True, starting_after=after)
        assert [event.to_dict() for event in rest] == reader.events[after + 1 :]


def test_the_same_request_with_the_same_key_is_the_same_response(client: openai.OpenAI) -> None:
    def ask(text: str, key: str, **more: Any) -> Any:
        return client.responses.create(input=text, background=True, extra_headers={"Idempotency-Key": key}, **more)

    first = ask("hi", "a", max_output_tokens=3)
    assert ask("hi", "a", max_output_tokens=3).id == first.id
    assert ask("hi", "b", max_output_tokens=3).id != first.id
    with pytest.raises(openai.ConflictError):
        ask("hi", "a", max_output_tokens=4)


def test_cancelling(bench: Bench, client: openai.OpenAI) -> None:
    bench.runtime.shard.hold()
    made = client.responses.create(input="hi", max_output_tokens=100, background=True)
    with pytest.raises(openai.ConflictError, match="cancel it first"):
        client.responses.delete(made.id)
    bench.runtime.shard.let(3)
    until(lambda: job_of(bench, made).last_event >= 1)
    bench.runtime.shard.let(1000)
    assert {client.responses.cancel(made.id).status for _ in range(2)} == {"cancelled"}
    events = list(client.responses.retrieve(made.id, stream=True))
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "cancelled")  # type: ignore[union-attr]
    client.responses.delete(made.id)


@pytest.mark.parametrize("background", [False, True])
def test_who_goes(bench: Bench, client: openai.OpenAI, background: bool) -> None:
    """In the foreground the job ends; in the background it goes on."""
    bench.runtime.shard.hold()
    stream = client.responses.create(input="hi", max_output_tokens=20, stream=True, background=background)
    made = next(iter(stream)).response  # type: ignore[union-attr]
    stream.close()
    if background:
        bench.runtime.shard.let(1000)
        until(lambda: job_of(bench, made).state is JobState.SUCCEEDED)
    else:
        live = bench.service._live
        until(lambda: (job := live.get(f"job_{made.id[5:]}")) is None or job.cancelled)
        bench.runtime.shard.let(1000)
        until(lambda: job_of(bench, made).state is JobState.CANCELLED)


def test_the_next_head_counts_the_same(bench: Bench, client: openai.OpenAI) -> None:
    made = client.responses.create(input="hi", max_output_tokens=12)
    whole = BackgroundReader(client, made.id)
    whole.read()
    bench.runtime.shard.hold()
    response = client.responses.create(input="hi", max_output_tokens=12, background=True)
    reader = BackgroundReader(client, response.id)

    def restart() -> None:
        bench.runtime.shard.let(2)
        bench.restart()
        bench.runtime.shard.hold()
        bench.runtime.shard.let(2)

    bench.runtime.shard.let(3)
    die_again_and_again(reader, restart, (2, 3, 1, 2))
    read_to_end(reader)
    reader.check()
    assert reader.text == whole.text
    again = BackgroundReader(client, response.id)
    again.read()
    assert again.events == reader.events


CALLS = ('<tool_call>\n{"name": "mcp__docs__search", "argu', 'ments": {"query": "x"}}\n</tool_call>')


def test_turns_of_codex() -> None:
    service = AnsweringService(CALLS, ("hm",))
    with serving_http(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        for body in (first_request(), request_after_calls()):
            unknown = {"client_metadata": body.pop("client_metadata")}  # to OpenAI's client
            events = list(client.responses.create(**body, extra_body=unknown))
            last: Any = events[-1]
            assert last.type == "response.completed"
            assert [item.type for item in last.response.output] == ["reasoning", "function_call"]
            assert last.response.output[1].namespace == "mcp__docs"
            assert last.response.usage.output_tokens == 3


def test_a_turn_with_tools_by_the_helper() -> None:
    service = AnsweringService(('<tool_call>\n{"name": "f", "arguments": {"a"', ": 1}}\n</tool_call>"), ("hm",))
    with serving_http(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        with client.responses.stream(model="needle", input="hi", tools=TOOLS) as stream:
            final = stream.get_final_response()
        call: Any = final.output[1]
        assert (call.name, call.arguments, call.status) == ("f", '{"a": 1}', "completed")
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        items: Any = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in final.output), result]
        client.responses.create(model="needle", input=items, tools=TOOLS)
        client.responses.create(model="needle", input=[result], previous_response_id=final.id, tools=TOOLS)  # type: ignore[list-item]
    first, second = (spec.input.messages for spec in service.specs[1:])
    assert first is not None
    assert [message.role for message in first] == ["user", "assistant", "tool"]
    assert (first[1].reasoning, first[1].tool_calls[0].id) == ("hm", call.call_id)
    assert second is not None
    assert second[2] == first[2]
