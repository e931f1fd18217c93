"""What becomes of each field of a response, and of the responses it goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from cluster.http.core.backend import Backend
from cluster.http.core.body import parse
from cluster.http.core.errors import ApiError, to_api_error
from cluster.http.openai.chat_request import ChatRequest, chat_spec
from cluster.http.responses.names import response_id
from cluster.http.responses.request import ResponsesRequest, in_own_words, response_spec
from cluster.http.responses.response import said_of
from cluster.jobs.model import ContextTooLong, InvalidJob, JobAnswer, JobRecord, JobSpec, JobState
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice
from protos.jobs.constraint import Constraint
from tests.support.data.clients.codex import DOCS, SEARCH, SHELL, first_request, request_after_calls
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend

DOCUMENT = f"doc_{'0123456789abcdef' * 2}"
SCHEMA = {"type": "object"}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_backend(FakeJobService())
    yield made
    made.close()


def request_of(**fields: Any) -> ResponsesRequest:
    return parse(ResponsesRequest, json.dumps({"input": "hi", **fields}).encode())


def spec_of(backend: Backend, key: str = "", **fields: Any) -> JobSpec:
    return response_spec(backend.service, backend, request_of(**fields), key)


def said(backend: Backend, **fields: Any) -> dict[str, Any]:
    return said_of(JobRecord("job_1", JobState.QUEUED, spec_of(backend, **fields), 1.0))


def test_a_text_is_the_chat_completion_that_says_the_same(backend: Backend) -> None:
    spec = spec_of(backend, temperature=0.5, max_output_tokens=7, reasoning={"effort": "none"}, request_id="r")
    chat = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "max_tokens": 7, "request_id": "r"}
    same = chat_spec(
        backend, parse(ChatRequest, json.dumps(chat | {"reasoning_effort": "none"}).encode()), backend.service.documents
    )
    assert replace(spec, request="") == same
    assert spec.attached


def test_the_requests_of_codex(backend: Backend) -> None:
    spec = spec_of(backend, **request_after_calls())
    messages = spec.input.messages
    assert messages is not None
    assert [message.role for message in messages] == [
        "system", "system", "user", "user", "assistant", "tool", "tool",
    ]  # fmt: skip
    assert messages[4] == ChatMessage(
        "assistant", "I will look.", "I should list them.",
        (ToolCall("call_1_0", "shell", '{"command":["bash","-lc","ls"]}'),
         ToolCall("call_1_1", "mcp__docs__search", '{"query":"files"}')),
    )  # fmt: skip
    assert [tool.name for tool in spec.input.tools] == ["shell", "update_plan", "mcp__docs__search"]
    assert spec.input.tools[0] == Tool("shell", SHELL["description"], json.dumps(SHELL["parameters"]))
    assert spec.attached
    assert not said(backend, **first_request())["store"]


def test_unknown_fields_are_ignored(backend: Backend) -> None:
    ignored = {
        "include": ["x"], "truncation": "auto", "service_tier": "flex", "stream_options": {"include_obfuscation": True},
        "max_tool_calls": 3, "client_metadata": {"a": "b"}, "made_up": [1], "metadata": None, "reasoning": None,
    }  # fmt: skip
    assert spec_of(backend, **ignored) == spec_of(backend)


def test_what_the_response_says_of_its_request(backend: Backend) -> None:
    format_ = {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}
    found = said(
        backend, instructions="Be brief.", metadata={"a": "b"}, text={"format": format_}, max_output_tokens=5,
        tools=[SHELL], tool_choice="none", parallel_tool_calls=False, user="u", reasoning={"effort": "low"},
        background=True,
    )  # fmt: skip
    assert found["instructions"] == "Be brief."
    assert found["metadata"] == {"a": "b"}
    assert found["text"] == {"format": format_, "verbosity": "medium"}
    assert (found["tools"], found["tool_choice"], found["parallel_tool_calls"]) == ([SHELL], "none", False)
    assert (found["max_output_tokens"], found["user"], found["model"]) == (5, "u", "needle")
    assert (found["background"], found["store"], found["reasoning"]["effort"]) == (True, True, "low")
    plain = said(backend)
    assert (plain["tools"], plain["tool_choice"], plain["text"]["format"]) == ([], "auto", {"type": "text"})


def test_the_background_is_no_attached_job_and_may_have_a_key(backend: Backend) -> None:
    spec = spec_of(backend, "k", background=True)
    assert (spec.attached, spec.idempotency_key) == (False, "k")
    assert spec_of(backend, "k").idempotency_key == ""
    assert spec.body_hash() == spec_of(backend, "k", background=True).body_hash()
    assert spec.body_hash() != spec_of(backend, "k", background=True, metadata={"a": "b"}).body_hash()


@pytest.mark.parametrize(("format_", "constraint"), [
    ({"type": "text"}, None), ({"type": "json_object"}, Constraint("json_object")),
    ({"type": "json_schema", "name": "n", "schema": SCHEMA}, Constraint("json_schema", json.dumps(SCHEMA))),
])  # fmt: skip
def test_formats(backend: Backend, format_: dict[str, Any], constraint: Constraint | None) -> None:
    assert spec_of(backend, text={"format": format_}).ask.structured_outputs == constraint


def test_a_function_in_a_namespace_can_be_chosen(backend: Backend) -> None:
    body = first_request() | {"tool_choice": {"type": "function", "namespace": "mcp__docs", "name": "search"}}
    assert spec_of(backend, **body).input.tool_choice == ToolChoice("named", "mcp__docs__search")


def test_a_question_about_a_stored_file(backend: Backend) -> None:
    parts = [{"type": "input_file", "file_id": f"file-{DOCUMENT[4:]}"}, {"type": "input_text", "text": "What?"}]
    spec = spec_of(backend, input=[{"role": "user", "content": parts}], instructions="Be brief.")
    assert (spec.input.document_id, spec.input.questions) == (DOCUMENT, ("Be brief.\nWhat?",))


FILE = {"role": "user", "content": [{"type": "input_file", "file_id": DOCUMENT}, {"type": "input_text", "text": "a"}]}


@pytest.mark.parametrize(("fields", "param"), [
    ({"background": True, "store": False}, "store"), ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata"), ({"metadata": {"a": 1}}, "metadata.a"),
    ({"input": []}, "input"), ({"input": 5}, "input"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"model": "gpt-4o"}, "model"), ({"temperature": -1}, "temperature"), ({"n": 2}, "n"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"tools": [SEARCH, {**DOCS, "tools": [{"type": "function", "name": "a b"}]}]}, "tools[1].tools[0].name"),
    ({"tools": [SEARCH, SHELL, SHELL]}, "tools[2].name"),
    ({"text": {"format": {"type": "x"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"input": [{"role": "user", "content": FILE["content"][:1]}]}, "input"),
    ({"input": [FILE], "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"previous_response_id": f"resp_{'0' * 32}"}, "previous_response_id"),
    ({"text": {"format": {"type": "json_object", "x": float("nan")}}}, "request"),
    ({"background": "maybe"}, "background"), ({"stream": []}, "stream"),
])  # fmt: skip
def test_what_is_wrong_is_named(backend: Backend, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Exception) as caught:
        spec_of(backend, **fields)
    shown = to_api_error(caught.value)
    assert shown.param == param, shown.message
    assert shown.message.startswith(param.split("[")[0]) or shown.status == 404
    assert shown.status == (404 if "previous_response_id" in fields or param == "model" else 400)


@pytest.mark.parametrize(("error", "param"), [
    (ContextTooLong("prompt: 5000 tokens: must be at most 4096"), "input"),
    (InvalidJob("max_tokens: 5: no"), "max_output_tokens"),
    (InvalidJob("structured_outputs.json: not at #: is not supported"), "tools"),
])  # fmt: skip
def test_what_the_service_refuses_is_named_in_the_words_of_the_protocol(error: Exception, param: str) -> None:
    shown = in_own_words(error, request_of())
    assert shown.param == param
    assert (
        in_own_words(InvalidJob("structured_outputs: no"), request_of(text={"format": {"type": "json_object"}})).param
        == "text.format"
    )


def test_a_response_goes_on_from_an_earlier_one() -> None:
    service = FakeJobService()
    backend = make_backend(service)
    first = service.submit(spec_of(backend, tools=[SHELL], instructions="Be brief."))
    again: dict[str, Any] = {"previous_response_id": response_id(first.id), "input": "and now?"}
    with pytest.raises(ApiError, match="must have been completed"):
        spec_of(backend, **again)
    text = 'I look.\n<tool_call>\n{"name": "shell", "arguments": {}}\n</tool_call>'
    answer = JobAnswer(0, 5, finish_reason="stop", text=text, reasoning="hm")
    service.records[first.id] = replace(first, state=JobState.SUCCEEDED, answers=(answer,))
    call = ToolCall(f"call_{first.id[4:]}_0", "shell", "{}")
    spec = spec_of(backend, **again, instructions="Be long.")
    assert spec.input.messages == (
        ChatMessage("system", "Be long."), ChatMessage("user", "hi"),
        ChatMessage("assistant", "I look.", "hm", (call,)), ChatMessage("user", "and now?"),
    )  # fmt: skip
    unstored = service.submit(spec_of(backend, store=False))
    with pytest.raises(ApiError) as caught:
        spec_of(backend, previous_response_id=response_id(unstored.id))
    assert (caught.value.status, caught.value.param) == (404, "previous_response_id")
    about_a_file = service.submit(spec_of(backend, input=[FILE]))
    service.records[about_a_file.id] = replace(about_a_file, state=JobState.SUCCEEDED, answers=(answer,))
    with pytest.raises(ApiError, match="is about a stored file"):
        spec_of(backend, previous_response_id=response_id(about_a_file.id))
    backend.close()
