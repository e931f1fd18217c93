"""Requests of the clients, built from good and bad arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

import pytest

import cluster
from cluster.client import requests
from cluster.client.documents.pieces import PIECE_BYTES
from cluster.client.ingest.source import DocumentText
from protos.jobs import jobs_pb2 as pb
from protos.jobs.constraint import Constraint
from protos.jobs.limits import MAX_CHARS, MAX_MESSAGES, MAX_REQUEST_BYTES
from protos.jobs.sampling import OPTIONS

BAD: list[tuple[str | None, Any, dict[str, Any]]] = [
    (None, None, {}),
    ("text", None, {}),
    ("text", [], {}),
    (None, "Why?", {"prompt": "p"}),
    ("text", "Why?", {"prompt": "p"}),
    (None, None, {"prompt": "p", "token_ids": [1]}),
    (None, None, {"token_ids": [-1]}),
    (None, None, {"token_ids": [1 << 32]}),
    (None, None, {"token_ids": ["1"]}),
    (None, None, {"messages": [{"role": "user"}]}),
    (None, None, {"messages": [{"role": "user", "content": "c", "nam": "n"}]}),
    (None, None, {"messages": ["hi"]}),
    (None, None, {"prompt": "p", "tools": [{"name": "f"}]}),
    (None, None, {"messages": [("user", "a")], "tools": [{"name": "f g"}]}),
    (None, None, {"messages": [("user", "a")], "tool_choice": "required"}),
    (None, None, {"prompt": "\ud800"}),
    ("text", [1], {}),
    (None, None, {"prompt": "p", "labels": {"k": 1}}),
    (None, None, {"prompt": "p", "max_tokens": -1}),
    (None, None, {"prompt": "p", "max_tokens": 1.5}),
    (None, None, {"prompt": "p", "seed": 1 << 64}),
    (None, None, {"prompt": "p", "priority": 1 << 31}),
    (None, None, {"prompt": "p", "temperature": "hot"}),
    (None, None, {"prompt": "p", "structured_outputs": {"xml": "a"}}),
    (None, None, {"prompt": "p", "structured_outputs": "a+"}),
    (None, None, {"prompt": "p", "structured_outputs": {"choice": ["\ud800"]}}),
]


@pytest.mark.parametrize(("document", "question", "options"), BAD)
def test_bad_requests_are_refused_before_they_are_sent(document: Any, question: Any, options: Any) -> None:
    with pytest.raises(cluster.InvalidRequest) as caught:
        requests.build_submit(document, question, options)
    assert isinstance(caught.value, ValueError)


def test_unknown_option_is_a_type_error() -> None:
    options: Any = {"prompt": "p", "max_token": 3}
    with pytest.raises(TypeError, match="max_token"):
        requests.build_submit(None, None, options)


def test_left_out_options_stay_unset() -> None:
    request = requests.build_submit(None, None, {"prompt": "", "temperature": None})
    assert request.WhichOneof("input") == "prompt"
    assert not request.sampling.ListFields()
    assert not request.HasField("deadline_s")
    assert len(request.idempotency_key) == 32
    assert requests.build_submit(None, None, {"token_ids": []}).WhichOneof("input") == "token_ids"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stop": "x" * (MAX_CHARS + 1)}, "stop: 257 characters: must have 1 to 256 characters"),
        ({"repetition_penalty": 0.001}, "repetition_penalty: 0.001: must be a number from 0.01 to 100"),
        ({"messages": [("user", "a")] * (MAX_MESSAGES + 1)}, "messages: 4097: must be at most 4096"),
        ({"presence_penalty": 3}, "presence_penalty: 3: must be a number from -2 to 2"),
        ({"logit_bias": {5: 200}}, "logit_bias: '200': must be a number from -100 to 100"),
        ({"min_tokens": 300}, "min_tokens: 300: must be at most max_tokens, 256"),
        ({"thinking_budget": -1}, "thinking_budget: -1: must be a whole number from 0"),
        ({"prompt": "x" * MAX_REQUEST_BYTES}, "prompt: 671"),
    ],
)
def test_limits_of_the_head_hold_before_anything_is_sent(options: Any, said: str) -> None:
    if not options.keys() & {"messages", "prompt"}:
        options = {"prompt": "p"} | options
    with pytest.raises(cluster.InvalidRequest) as caught:
        requests.build_submit(None, None, options)
    assert str(caught.value).startswith(said)


def test_keyword_arguments_are_the_declared_options() -> None:
    names = list(get_type_hints(requests.SubmitOptions, localns={"DocumentInfo": object}))
    assert [name for name in names if name in OPTIONS] == list(OPTIONS)
    others = {
        "token_ids",
        "messages",
        "tools",
        "tool_choice",
        "prompt",
        "priority",
        "deadline_s",
        "attached",
        "idempotency_key",
        "labels",
    }
    assert set(names) - set(OPTIONS) == others


def test_structured_outputs_in_the_forms_of_vllm() -> None:
    schema = {"type": "integer"}
    for value in ({"json": schema}, {"json": '{"type": "integer"}'}, Constraint("json_schema", '{"type": "integer"}')):
        request = requests.build_submit(None, None, {"prompt": "p", "structured_outputs": value})
        assert request.sampling.structured_outputs == pb.StructuredOutputs(
            kind="json_schema", text='{"type": "integer"}'
        )


def test_listing_requests() -> None:
    assert requests.list_request([], None, None).page_size == requests.PAGE_SIZE
    assert requests.list_request(["queued"], {"a": "b"}, 7) == pb.ListRequest(
        states=[pb.QUEUED], labels={"a": "b"}, page_size=7
    )
    for states, limit in ((["done"], None), ("queued", None), (["state_unspecified"], None), ([], 0)):
        with pytest.raises(cluster.InvalidRequest):
            requests.list_request(states, None, limit)


def test_reading_a_document_asks_nothing() -> None:
    request = requests.build_read("doc_1")
    assert (request.document.document_id, request.document.read, list(request.document.questions)) == (
        "doc_1",
        True,
        [],
    )
    assert request.idempotency_key != requests.build_read("doc_1").idempotency_key
    with pytest.raises(cluster.InvalidRequest, match="document id: 5: must be text"):
        requests.build_read(5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("document", "expected"),
    [("x", False), ("x" * PIECE_BYTES, False), ("x" * (PIECE_BYTES + 1), True), ("é" * PIECE_BYTES, True),
     (Path("a"), True), ([Path("a"), "b"], True), (DocumentText(b"x"), True)],
    ids=range(7),
)  # fmt: skip
def test_what_is_uploaded_first(document: object, expected: bool) -> None:
    assert requests.needs_upload(document) == expected


def test_a_chat_with_tools_has_the_fields_of_the_contract() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat: requests.SubmitOptions = {
        "messages": [("user", "a"), {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "hm"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
    }
    message = requests.build_submit(None, None, chat).chat
    assert message == pb.Chat(
        messages=[
            pb.Message(role="user", content="a"),
            pb.Message(
                role="assistant", reasoning="hm", tool_calls=[pb.ToolCall(id="c1", name="f", arguments='{"a": 1}')]
            ),
        ],
        tools=[pb.Tool(name="f", parameters='{"type": "object"}')],
        tool_choice=pb.ToolChoice(mode="named", name="f"),
    )
