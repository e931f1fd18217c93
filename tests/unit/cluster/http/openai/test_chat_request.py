"""Chat completions as clients send them, and what becomes of each field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.http.core.backend import Backend
from cluster.http.core.body import parse
from cluster.http.core.errors import ApiError, to_api_error
from cluster.http.openai.chat_request import ChatRequest, chat_spec, chat_specs
from cluster.jobs.model import JobSpec
from protos.errors import InvalidRequest
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice
from protos.jobs.constraint import Constraint
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend

PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
FUNCTION = {"type": "function", "function": {"name": "f", "description": "d", "parameters": PARAMETERS}}
USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    made = make_backend(FakeJobService())
    yield made
    made.close()


def spec_of(backend: Backend, **fields: Any) -> JobSpec:
    body = json.dumps({"messages": [USER], **fields}).encode()
    return chat_spec(backend, parse(ChatRequest, body), backend.service.documents)


@pytest.mark.parametrize(("fields", "constraint"), [
    ({}, None), ({"response_format": {"type": "json_object"}}, Constraint("json_object")),
    ({"structured_outputs": {"regex": "a+"}}, Constraint("regex", "a+")),
])  # fmt: skip
def test_what_the_answer_must_match(backend: Backend, fields: dict[str, Any], constraint: Constraint | None) -> None:
    assert spec_of(backend, **fields).ask.structured_outputs == constraint


def refusal(backend: Backend, **fields: Any) -> ApiError:
    with pytest.raises(Exception) as caught:
        spec_of(backend, **fields)
    return to_api_error(caught.value)


def test_what_says_nothing_is_an_attached_job_that_answers_as_long_as_fits(backend: Backend) -> None:
    spec = spec_of(backend)
    assert spec.input.messages == (ChatMessage("user", "hi"),)
    assert spec.attached
    assert spec.shorten
    assert spec.ask.max_tokens == backend.limits.http_max_tokens
    assert spec.ask.sampling.temperature is None  # what the model's files say
    assert spec.ask.enable_thinking is None


def test_what_clients_send_and_nobody_needs_is_ignored(backend: Backend) -> None:
    ignored = {
        "user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prompt_cache_key": "k",
        "prompt_cache_retention": "24h", "safety_identifier": "s", "parallel_tool_calls": True, "verbosity": "low",
        "made_up": {"x": [1]}, "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
    }  # fmt: skip
    harmless = {
        "n": 1, "logit_bias": {}, "frequency_penalty": None, "thinking_token_budget": None, "tools": [],
        "tool_choice": "auto", "modalities": ["text"], "stop": None, "seed": None, "model": None, "min_tokens": 0,
    }  # fmt: skip
    spec = spec_of(backend, **ignored, **harmless)
    assert spec == spec_of(backend)


def test_roles_and_parts(backend: Backend) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "audio": None, "made_up": [1]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1", "name": "f"},
    ]
    assert spec_of(backend, messages=messages).input.messages == (
        ChatMessage("system", "be brief"), ChatMessage("user", "a\nb"), ChatMessage("assistant"),
        ChatMessage("tool", "42", tool_call_id="call_1", name="f"),
    )  # fmt: skip


def test_tools_and_earlier_calls(backend: Backend) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        USER, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
    ]  # fmt: skip
    spec = spec_of(backend, messages=messages, tools=[FUNCTION], parallel_tool_calls=True)
    assert spec.input.tools == (Tool("f", "d", json.dumps(PARAMETERS)),)
    assert spec.input.tool_choice == ToolChoice()
    assert spec.ask.structured_outputs is None
    assert spec.input.messages == (
        ChatMessage("user", "hi"), ChatMessage("assistant", tool_calls=(ToolCall("c1", "f", '{"a": 1}'),)),
        ChatMessage("tool", "2", tool_call_id="c1"),
    )  # fmt: skip


@pytest.mark.parametrize(("said", "choice"), [
    ("required", ToolChoice("required", one_call=True)),
    ({"type": "function", "function": {"name": "f"}}, ToolChoice("named", "f", True)),
])  # fmt: skip
def test_calls_that_must_be_made_are_a_grammar(backend: Backend, said: object, choice: ToolChoice) -> None:
    spec = spec_of(backend, tools=[FUNCTION], tool_choice=said, parallel_tool_calls=False)
    assert spec.input.tool_choice == choice
    grammar = backend.runtime.call_grammar(spec.input.tools, choice)
    assert grammar
    assert spec.ask.structured_outputs == Constraint("grammar", grammar)


def test_a_format_counts_where_no_tool_may_be_called(backend: Backend) -> None:
    spec = spec_of(backend, tools=[FUNCTION], tool_choice="none", response_format={"type": "json_object"})
    assert spec.ask.structured_outputs == Constraint("json_object")
    assert spec.input.tools


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_is_handed_on(backend: Backend, field: str) -> None:
    messages = [USER, {"role": "assistant", "content": "yes", field: "let me see"}, USER]
    found = spec_of(backend, messages=messages).input.messages
    assert found is not None
    assert found[1] == ChatMessage("assistant", "yes", "let me see")


DOCUMENT = "0123456789abcdef" * 2


@pytest.mark.parametrize("file_id", [f"file-{DOCUMENT}", f"doc_{DOCUMENT}"])
def test_a_file_part_is_a_stored_document(backend: Backend, file_id: str) -> None:
    texts = [{"type": "text", "text": "What"}, {"type": "text", "text": "now?"}]
    parts = [{"type": "file", "file": {"file_id": file_id}}, *texts]
    source = spec_of(backend, messages=[{"role": "user", "content": parts}]).input
    assert (source.document_id, source.questions, source.messages) == (f"doc_{DOCUMENT}", ("What\nnow?",), None)


FILE = {"type": "file", "file": {"file_id": f"file-{DOCUMENT}"}}
TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(("messages", "param"), [
    ([{"role": "user", "content": [FILE]}], "messages[0].content"),
    ([{"role": "user", "content": [{"type": "file", "file": {"file_data": "Y?"}}, TEXT]}],
     "messages[0].content[0].file"),
    ([{"role": "user", "content": [{"type": "file"}, TEXT]}], "messages[0].content[0].file"),
    ([{"role": "user", "content": [FILE, {"type": "image_url"}]}], "messages[0].content[1].type"),
])  # fmt: skip
def test_files_that_cannot_be_read_are_refused(backend: Backend, messages: list[Any], param: str) -> None:
    assert refusal(backend, messages=messages).param == param


def test_other_files_become_text_of_their_messages(backend: Backend) -> None:
    record = backend.service.add_document("report.txt", [b"4711\n"], 100)
    stored = {"type": "file", "file": {"file_id": f"file-{record.id.removeprefix('doc_')}"}}
    sent = {"type": "file", "file": {"filename": "a.md", "file_data": f"data:text/markdown;base64,{'SGk='}"}}
    for messages, extra in (
        ([USER, {"role": "assistant", "content": "a"}, {"role": "user", "content": [stored, TEXT, sent]}], {}),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": [stored, TEXT, sent]}], {}),
        ([{"role": "user", "content": [stored, TEXT, sent]}], {"tools": [FUNCTION]}),
    ):
        found = spec_of(backend, messages=messages, **extra).input.messages
        assert found is not None
        assert found[-1].content == "==> report.txt <==\n4711\n\nWhat?\n==> a.md <==\nHi\n"


def test_an_id_that_is_none_is_refused(backend: Backend) -> None:
    parts = [{"type": "file", "file": {"file_id": "file-../../etc"}}, TEXT]
    assert refusal(backend, messages=[{"role": "user", "content": parts}]).status == 400


def test_both_names_of_the_token_limit(backend: Backend) -> None:
    assert spec_of(backend, max_tokens=7).ask.max_tokens == 7
    assert spec_of(backend, max_tokens=7, max_completion_tokens=9).ask.max_tokens == 9
    assert not spec_of(backend, max_tokens=7).shorten
    assert refusal(backend, max_tokens=0).param == "max_tokens"


@pytest.mark.parametrize(("fields", "thinking"), [
    ({"chat_template_kwargs": {"enable_thinking": False}}, False), ({"enable_thinking": True}, True),
    ({"reasoning_effort": "none"}, False), ({"reasoning_effort": "high"}, None),
    ({"reasoning_effort": "none", "enable_thinking": True}, True), ({"chat_template_kwargs": {"other": 1}}, None),
])  # fmt: skip
def test_the_switches_of_thinking(backend: Backend, fields: dict[str, Any], thinking: bool | None) -> None:
    assert spec_of(backend, **fields).ask.enable_thinking is thinking


def test_sampling_and_more(backend: Backend) -> None:
    spec = spec_of(
        backend, temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.1, seed=5, stop=["a", "b"],
        stop_token_ids=[3], ignore_eos=True, priority=2, cache_salt="s", request_id="r", logprobs=True, top_logprobs=3,
    )  # fmt: skip
    sampling = spec.ask.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.repetition_penalty, sampling.seed, sampling.logprobs) == (1.1, 5, 3)
    assert (spec.ask.stop, spec.ask.stop_token_ids, spec.ask.ignore_eos) == (("a", "b"), (3,), True)
    assert (spec.priority, spec.cache_salt, dict(spec.labels)) == (-2, "s", {"request_id": "r"})
    assert spec_of(backend, stop="a").ask.stop == ("a",)
    assert spec_of(backend, logprobs=True).ask.sampling.logprobs == 0


def test_several_answers_are_a_job_each(backend: Backend) -> None:
    def specs(**fields: Any) -> list[JobSpec]:
        asked = parse(ChatRequest, json.dumps({"messages": [USER], **fields}).encode())
        return chat_specs(backend, asked, backend.service.documents)

    assert specs() == specs(n=1) == [spec_of(backend)]
    assert specs(n=3) == [spec_of(backend)] * 3
    found = specs(n=3, seed=(1 << 63) - 2)
    assert [spec.ask.sampling.seed for spec in found] == [(1 << 63) - 2, (1 << 63) - 1, 0]
    assert found[1] == spec_of(backend, seed=(1 << 63) - 1)
    for count in (0, 9, -1):
        with pytest.raises(InvalidRequest, match=rf"^n: {count}: must be a whole number from 1 to 8$"):
            specs(n=count)


def test_what_bends_the_choice_of_tokens_is_the_job_s(backend: Backend) -> None:
    ask = spec_of(
        backend, presence_penalty=1.5, frequency_penalty=-0.5, logit_bias={"7": -100, "5": 1}, min_tokens=3,
        thinking_token_budget=9,
    ).ask  # fmt: skip
    assert (ask.sampling.presence_penalty, ask.sampling.frequency_penalty) == (1.5, -0.5)
    assert (ask.logit_bias, ask.min_tokens, ask.thinking_budget) == (((5, 1.0), (7, -100.0)), 3, 9)
    assert spec_of(backend, thinking_budget=0).ask.thinking_budget == 0
    assert spec_of(backend, thinking_budget=5, thinking_token_budget=4).ask.thinking_budget == 4


@pytest.mark.parametrize(("fields", "param"), [
    ({"n": 2}, "n"), ({"best_of": 2}, "best_of"), ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"min_tokens": -5}, "min_tokens"), ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"frequency_penalty": 2.5}, "frequency_penalty"), ({"presence_penalty": -2.5}, "presence_penalty"),
    ({"thinking_token_budget": -5}, "thinking_token_budget"), ({"thinking_budget": -5}, "thinking_budget"),
    ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_k": -2}, "top_k"), ({"seed": -1}, "seed"),
    ({"stop": "x" * 300}, "stop"), ({"stop": ["x"] * 65}, "stop"), ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"model": "gpt-4o"}, "model"), ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"), ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [FUNCTION], "tool_choice": "maybe"}, "tool_choice"),
    ({"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [FUNCTION], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"modalities": ["text", "audio"]}, "modalities"), ({"audio": {}}, "audio"), ({"functions": [{}]}, "functions"),
    ({"chat_template_kwargs": {"enable_thinking": 3}}, "chat_template_kwargs.enable_thinking"),
    ({"priority": 1 << 40}, "priority"), ({"cache_salt": "x" * 300}, "cache_salt"), ({"stream": "maybe"}, "stream"),
])  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(backend: Backend, fields: dict[str, Any], param: str) -> None:
    refused = refusal(backend, **fields)
    assert refused.status == (404 if param == "model" else 400)
    assert refused.param == param
    assert param in refused.message
