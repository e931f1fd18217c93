"""Messages as one object and as a stream: order of events, reasons, usage, errors."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.engine.outputs import OutputToken
from cluster.http.core import following
from cluster.jobs.model import ContextTooLong, JobState, ServiceBusy
from tests.support.rigs.http import AnsweringService, direct_client, needle_tokenizer
from tests.unit.cluster.http.anthropic.test_blocks import events, joined

USER = {"role": "user", "content": "hi"}


def ask(service: AnsweringService, path: str = "", keys: Any = None, **fields: Any) -> Any:
    """The response to one request."""

    async def run() -> Any:
        with direct_client(service, keys) as client:
            return await client.post(f"/v1/messages{path}", json={"messages": [USER], "max_tokens": 99, **fields})

    return asyncio.run(run())


def test_one_object() -> None:
    answer = ask(AnsweringService(reasoning=("hm ", "so"))).json()
    assert answer["id"].startswith("msg_")
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", "needle")
    assert answer["content"] == [
        {"type": "thinking", "thinking": "hm so", "signature": ""},
        {"type": "text", "text": "The answer is forty-two."},
    ]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    assert answer["usage"] == {
        "input_tokens": 12, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 5, "output_tokens": 8,
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_mark_protects_is_counted(stream: bool) -> None:
    """Of 17 tokens 5 were found; 16 are whole blocks of 4."""
    answer = ask(AnsweringService(), cache_control={"type": "ephemeral"}, stream=stream)
    shown = events(answer.content)[-2] if stream else answer.json()
    assert shown["usage"] == {
        "input_tokens": 1, "cache_creation_input_tokens": 11, "cache_read_input_tokens": 5, "output_tokens": 6,
    }  # fmt: skip


def test_a_stream_has_the_events_in_their_order() -> None:
    answer = ask(AnsweringService(reasoning=("hm ", "so")), stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.content)
    kinds = [one["type"] for one in found]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    begun = found[0]["message"]
    assert (begun["content"], begun["stop_reason"], begun["usage"]["output_tokens"]) == ([], None, 0)
    blocks = joined([one for one in found if one["type"].startswith("content_block")])
    assert blocks == ask(AnsweringService(reasoning=("hm ", "so"))).json()["content"]
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert found[-2]["usage"]["cache_read_input_tokens"] == 5


def test_silence_is_filled_by_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "KEEP_ALIVE_S", 0.0)
    service = AnsweringService()
    service.events = [None, None, *service.events]
    kinds = [one["type"] for one in events(ask(service, stream=True).content)]
    assert kinds[2:5] == ["ping"] * 3  # after the progress, too


def test_calls_end_a_turn() -> None:
    tools = [{"name": "f", "input_schema": {"type": "object"}}]
    service = AnsweringService(('<tool_call>\n{"name": "f", "argu', 'ments": {"a": 1}}\n</tool_call>'))
    answer = ask(service, tools=tools).json()
    ((call,), reason) = answer["content"], answer["stop_reason"]
    assert (call["type"], call["name"], call["input"], reason) == ("tool_use", "f", {"a": 1}, "tool_use")
    found = events(ask(service, tools=tools, stream=True).content)
    assert [one["delta"]["stop_reason"] for one in found if one["type"] == "message_delta"] == ["tool_use"]


def test_an_answer_that_was_cut_short_says_by_what() -> None:
    service = AnsweringService()
    service.finish_reason = "length"
    assert ask(service).json()["stop_reason"] == "max_tokens"


def test_the_stop_sequence_is_named() -> None:
    tokenizer, service = needle_tokenizer(), AnsweringService()
    ids = tokenizer.encode("It ends here STOP ")
    service.output = [OutputToken(n, 0, token_id, "a", answer="a") for n, token_id in enumerate(ids, 1)]
    service.events = [service.output]
    answer = ask(service, stop_sequences=["never", "STOP "]).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "STOP ")
    assert ask(service, stop_sequences=["never"]).json()["stop_reason"] == "end_turn"
    assert ask(service, stop_sequences=["ends"]).json()["stop_reason"] == "end_turn"  # not by the newest token


def test_errors_have_the_form_of_the_protocol() -> None:
    service = AnsweringService()
    for error, status, kind, said in (
        (ContextTooLong("prompt: 9 tokens: must be at most 8"), 400, "invalid_request_error", "prompt is too long: "),
        (ServiceBusy("full", 1.0), 429, "rate_limit_error", "full"),
        (ZeroDivisionError(), 500, "api_error", "internal error"),
    ):
        service.error = error
        answer = ask(service)
        assert (answer.status_code, answer.json()["type"]) == (status, "error")
        assert answer.json()["error"]["type"] == kind
        assert answer.json()["error"]["message"].startswith(said)
    service.error = None
    assert ask(service, model="gpt").json()["error"]["type"] == "not_found_error"
    assert ask(service, "/nothing").json()["error"]["type"] == "not_found_error"

    class NoKeys:
        def name(self, key: str) -> None:
            return None

    assert ask(service, keys=NoKeys()).json()["error"]["type"] == "authentication_error"
    service.outcome = JobState.FAILED
    assert ask(service).json()["error"] == {"type": "api_error", "message": "the pipeline broke"}
    last = events(ask(service, stream=True).content)[-1]
    assert last == {"type": "error", "error": {"type": "api_error", "message": "the pipeline broke"}}


def test_tokens_are_counted() -> None:
    service = AnsweringService()
    fields: dict[str, Any] = {"system": "Be kind.", "tools": [{"name": "f", "input_schema": {"type": "object"}}]}
    few, many = ask(service, "/count_tokens").json(), ask(service, "/count_tokens", **fields).json()
    assert 0 < few["input_tokens"] < many["input_tokens"]
    assert not service.specs
