"""Anthropic's own client against the server: what its users and Claude Code call, as they call it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from cluster.jobs.model import ContextTooLong, JobState, ServiceBusy
from cluster.server.head import Head
from tests.support.data.clients import claude_code
from tests.support.fakes.runtime import FakeRuntime
from tests.support.rigs.head import free_port, until
from tests.support.rigs.http import TEAM_KEY as KEY
from tests.support.rigs.http import AnsweringService, serving_http

ASK: dict[str, Any] = {"model": "needle", "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}]}
CALL = ("Let me look.", '<tool_call>\n{"name": "Read", "arg', 'uments": {"file_path": "/a.txt"}}\n</tool_call>')


@pytest.fixture
def client(scripted: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=scripted, api_key=KEY, max_retries=0) as made:
        yield made


def test_a_message(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**ASK, system="Be kind.", stop_sequences=["END"])
    thinking, text = answer.content
    assert (thinking.type, text.type) == ("thinking", "text")
    assert text.text == "The answer is forty-two."
    assert (answer.stop_reason, answer.usage.output_tokens, answer.usage.cache_read_input_tokens) == ("end_turn", 8, 5)
    assert client.messages.count_tokens(model="needle", messages=ASK["messages"]).input_tokens > 0


def test_a_stream_adds_up_to_the_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == "The answer is forty-two."
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert (final.stop_reason, final.usage.output_tokens) == ("end_turn", 8)


def test_a_turn_with_tools() -> None:
    service = AnsweringService(CALL, ("hm",))
    with serving_http(service) as url, anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        first = claude_code.first_turn(max_tokens=999)
        answer = client.messages.create(**{name: first[name] for name in ("model", "messages", "max_tokens", "tools")})
        assert answer.stop_reason == "tool_use"
        call = answer.content[-1]
        assert (call.name, call.input) == ("Read", {"file_path": "/a.txt"})
        with client.messages.stream(
            model="needle", max_tokens=99, messages=first["messages"], tools=first["tools"]
        ) as s:
            streamed = s.get_final_message()
        assert [block.type for block in streamed.content] == ["thinking", "text", "tool_use"]
        assert streamed.content[-1].input == call.input
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "hello"}]}
        history = [*first["messages"], {"role": "assistant", "content": answer.content}, result]
        client.messages.create(model="needle", max_tokens=9, messages=history, tools=first["tools"])
    said = service.specs[-1].input.messages
    assert said is not None
    assert (said[1].reasoning, said[1].tool_calls[0].id, said[2].tool_call_id) == ("hm", call.id, call.id)


def test_closing_a_stream_ends_the_job(service: AnsweringService, client: anthropic.Anthropic) -> None:
    service.endless = True
    stream = client.messages.create(**ASK, stream=True)
    for _ in range(3):
        next(stream)
    stream.close()
    until(lambda: [record.state for record in service.records.values()] == [JobState.CANCELLED])


def test_errors_are_those_that_the_client_knows(
    service: AnsweringService, client: anthropic.Anthropic, scripted: str
) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**ASK | {"model": "another"})
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=scripted, api_key="wrong", max_retries=0).messages.create(**ASK)
    service.error = ContextTooLong("prompt: 9 tokens: must be at most 8")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(**ASK)
    service.error = ServiceBusy("queue: 256 jobs wait", 0.05)
    with pytest.raises(anthropic.RateLimitError, match="256 jobs wait"):
        client.messages.create(**ASK)
    service.error, service.outcome = None, JobState.FAILED
    with pytest.raises(anthropic.APIError, match="the pipeline broke"), client.messages.stream(**ASK) as stream:
        stream.get_final_message()


def test_the_prefix_of_claude_code_is_found_although_its_first_line_changes(tmp_path: Path) -> None:
    with FakeRuntime(tmp_path, http_port=free_port()) as runtime:
        head = Head(runtime.deployment, runtime=runtime)
        head.start()
        found = []
        for billing in ("fa690", "0b1c2"):
            body = claude_code.first_turn(billing, stream=False, max_tokens=2, tools=[], model=None)
            usage = httpx.post(f"{head.service.http_url}/v1/messages", json=body, timeout=30).json()["usage"]
            found.append((usage["input_tokens"], usage["cache_read_input_tokens"]))
        head.close()
    (all_tokens, before), (rest, cached) = found
    assert (before, rest + cached) == (0, all_tokens)
    assert cached >= all_tokens - 17  # all whole pages
