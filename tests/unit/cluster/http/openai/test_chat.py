"""Chat completions as one object and as a stream: order of chunks, names of fields, ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cluster.common.errors import JobStoreError
from cluster.engine.outputs import PrefillProgress
from cluster.jobs.model import ContextTooLong, InvalidJob, JobState, ServiceBusy
from cluster.jobs.subscriptions import ProgressUpdate
from tests.support.rigs.http import AnsweringService, direct_client

USER = {"role": "user", "content": "hi"}


def ask(service: AnsweringService, body: dict[str, Any] | None = None, **limits: object) -> Any:
    """The response to one chat completion."""

    async def run() -> Any:
        with direct_client(service, **limits) as client:
            return await client.post("/v1/chat/completions", json={"messages": [USER], **(body or {})})

    return asyncio.run(run())


def chunks(answer: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as it should."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text(found: list[dict[str, Any]], field: str) -> str:
    return "".join(chunk["choices"][0]["delta"].get(field) or "" for chunk in found if chunk["choices"])


def test_one_object() -> None:
    answer = ask(AnsweringService(reasoning=("hm ", "so"))).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "needle"
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "The answer is forty-two.", "reasoning": "hm so", "reasoning_content": "hm so",
    }  # fmt: skip
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "stop")
    assert answer["usage"] == {
        "prompt_tokens": 17, "completion_tokens": 8, "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 5}, "completion_tokens_details": {"reasoning_tokens": 2},
    }  # fmt: skip


def test_a_stream_begins_with_the_role_and_ends_with_reason_usage_and_done() -> None:
    body = {"stream": True, "stream_options": {"include_usage": True}}
    found = chunks(ask(AnsweringService(reasoning=("hm",)), body))
    assert {chunk["object"] for chunk in found} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in found}) == 1
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text(found, "content") == "The answer is forty-two."
    assert text(found, "reasoning") == text(found, "reasoning_content") == "hm"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in found[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 7
    without = chunks(ask(AnsweringService(), {"stream": True}))
    assert without[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in chunk for chunk in without)


def test_several_answers_in_one_object_and_one_stream() -> None:
    whole = ask(AnsweringService(reasoning=("hm",)), {"n": 3}).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in whole["choices"]} == {"The answer is forty-two."}
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (17, 21)
    service = AnsweringService(reasoning=("hm",))
    service.events = [ProgressUpdate(0, PrefillProgress(100, 10, 60, 2000)), *service.events]
    body = {"n": 3, "stream": True, "return_progress": True, "stream_options": {"include_usage": True}}
    found = chunks(ask(service, body))
    assert [chunk["choices"][0]["index"] for chunk in found[:3]] == [0, 1, 2]
    assert len({chunk["id"] for chunk in found}) == 1
    assert found[-1]["usage"] == whole["usage"]
    assert {chunk["choices"][0]["index"] for chunk in found if "prompt_progress" in chunk} == {0}
    for index in range(3):
        own = [chunk for chunk in found[:-1] if chunk["choices"][0]["index"] == index]
        assert text(own, "content") == "The answer is forty-two."
        assert text(own, "reasoning") == "hm"
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in own]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_a_setting_picks_one_name_of_reasoning(field: str) -> None:
    service = AnsweringService(reasoning=("hm",))
    message = ask(service, http_reasoning_field=field).json()["choices"][0]["message"]
    assert set(message) == {"role", "content", field}


def test_the_reason_survives_log_probabilities_in_a_stream() -> None:
    service = AnsweringService(("a", "b"))
    service.finish_reason = "length"
    found = chunks(ask(service, {"stream": True, "logprobs": True, "top_logprobs": 1}))
    assert found[-1]["choices"][0]["finish_reason"] == "length"
    entries = [entry for c in found for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["logprob"] for entry in entries] == [-0.25, -0.25]
    assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in entries)
    assert [len(entry["top_logprobs"]) for entry in entries] == [1, 1]


def test_progress_is_told_when_asked_for() -> None:
    service = AnsweringService()
    service.events = [ProgressUpdate(0, PrefillProgress(100, 10, 60, 2000)), *service.events]
    shown = [c["prompt_progress"] for c in chunks(ask(service, {"stream": True, "return_progress": True}))
             if "prompt_progress" in c]  # fmt: skip
    assert [(p["processed"], p["cache"], p["total"], p["eta_ms"]) for p in shown] == [
        (50, 0, 100, None), (60, 10, 100, 2000),
    ]  # fmt: skip
    assert all(p["time_ms"] >= 0 for p in shown)
    assert not any("prompt_progress" in c for c in chunks(ask(service, {"stream": True})))


def test_progress_as_reasoning_text_is_told_now_and_then() -> None:
    service = AnsweringService()
    service.events = [ProgressUpdate(0, PrefillProgress(100, 10, n, 2000)) for n in range(60, 90)] + service.events
    found = chunks(ask(service, {"stream": True, "return_progress": "reasoning"}))
    assert text(found, "reasoning") == "read 50 %\n"
    assert text(found, "content") == "The answer is forty-two."


def test_a_job_that_fails_is_an_error_either_way() -> None:
    service = AnsweringService()
    service.outcome = JobState.FAILED
    whole = ask(service)
    assert (whole.status_code, whole.json()["error"]["message"]) == (500, "the pipeline broke")
    last = chunks(ask(service, {"stream": True}))[-1]
    assert last["error"]["code"] == "job_failed"
    service.outcome = JobState.CANCELLED
    assert ask(service).json()["error"]["code"] == "job_cancelled"


@pytest.mark.parametrize(("error", "status", "param"), [
    (ContextTooLong("prompt: 5000 tokens"), 400, "messages"), (ServiceBusy("full", 2.5), 429, None),
    (JobStoreError("locked"), 503, None),
])  # fmt: skip
def test_what_the_service_refuses_is_refused_before_a_stream_begins(
    error: Exception, status: int, param: str | None
) -> None:
    service = AnsweringService()
    service.error = error
    refused = ask(service, {"stream": True})
    assert refused.status_code == status
    assert refused.json()["error"]["param"] == param
    if status != 400:
        assert int(refused.headers["retry-after"]) >= 1


def test_the_head_stops_in_the_middle() -> None:
    service = AnsweringService()
    service.finish = lambda job_id: service.get(job_id)  # type: ignore[method-assign]  # no record that has ended
    last = chunks(ask(service, {"stream": True}))[-1]
    assert last["error"]["code"] == "stopping"
    assert ask(service).status_code == 503


@pytest.mark.parametrize(("field", "value"), [
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}),
    ("structured_outputs", {"json": {"not": {}}}),
])  # fmt: skip
def test_a_constraint_that_cannot_be_compiled_is_refused_by_its_field(field: str, value: dict[str, Any]) -> None:
    service = AnsweringService()
    service.error = InvalidJob("structured_outputs.json: not at #: is not supported: leave it out")
    refused = ask(service, {field: value})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith(field)
    assert "not at #" in refused.json()["error"]["message"]


FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALLS = (
    "Let me ", "look.\n<tool", '_call>\n{"name": "f", "argu', 'ments": {"a"', ": 1}}\n</tool_call>", "\n<tool_call>\n",
    '{"name": "now"}', "\n</tool_call>",
)  # fmt: skip


def test_tool_calls_of_one_object() -> None:
    (choice,) = ask(AnsweringService(CALLS, ("hm",)), {"tools": [FUNCTION]}).json()["choices"]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert (message["content"], message["reasoning"]) == ("Let me look.", "hm")
    assert [call["type"] for call in message["tool_calls"]] == ["function"] * 2
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'}, {"name": "now", "arguments": "{}"},
    ]  # fmt: skip
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    alone = ask(AnsweringService(CALLS[1:]), {"tools": [FUNCTION], "parallel_tool_calls": False}).json()
    assert len(alone["choices"][0]["message"]["tool_calls"]) == 1
    only = ask(AnsweringService(CALLS[5:]), {"tools": [FUNCTION]}).json()
    assert only["choices"][0]["message"]["content"] is None


@pytest.mark.parametrize("logprobs", [False, True])
def test_tool_calls_of_a_stream(logprobs: bool) -> None:
    found = chunks(ask(AnsweringService(CALLS), {"stream": True, "tools": [FUNCTION], "logprobs": logprobs}))
    assert found[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert text(found, "content") == "Let me look."
    deltas = [one for chunk in found for one in chunk["choices"][0]["delta"].get("tool_calls", [])]
    for index, (name, arguments) in enumerate([("f", '{"a": 1}'), ("now", "{}")]):
        first, *others = [one for one in deltas if one["index"] == index]
        assert first["id"].startswith("call_")
        assert first == {
            "index": index, "id": first["id"], "type": "function", "function": {"name": name, "arguments": ""},
        }  # fmt: skip
        assert all(set(one) == {"index", "function"} and set(one["function"]) == {"arguments"} for one in others)
        assert "".join(one["function"]["arguments"] for one in others) == arguments
    entries = [entry for c in found for entry in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(entries) == (len(CALLS) if logprobs else 0)


def test_what_looks_like_a_call_is_text_without_tools() -> None:
    for body in ({}, {"tools": [FUNCTION], "tool_choice": "none"}):
        (choice,) = ask(AnsweringService(CALLS), body).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("".join(CALLS), "stop")
        assert "tool_calls" not in choice["message"]


def test_a_call_that_is_cut_short_ends_by_its_length() -> None:
    service = AnsweringService(CALLS[:4])
    service.finish_reason = "length"
    found = chunks(ask(service, {"stream": True, "tools": [FUNCTION]}))
    assert found[-1]["choices"][0]["finish_reason"] == "length"
