"""Items as messages of a chat, and messages as items again."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from cluster.http.core.errors import ApiError, to_api_error
from cluster.http.responses.input_items import listed_items, page, to_messages, with_instructions
from cluster.http.responses.names import split_names
from cluster.jobs.model import JobInput, JobRecord, JobSpec, JobState, new_id
from protos.jobs.chat_values import read_messages
from protos.jobs.sampling import AnswerOptions
from tests.support.data.clients.codex import DOCS, request_after_calls

USER = {"role": "user", "content": "hi"}
DOCUMENT = f"doc_{'0123456789abcdef' * 2}"


def test_a_text_is_a_message_of_the_user() -> None:
    assert to_messages("hi") == [USER]


def test_the_items_of_a_turn_are_one_message() -> None:
    assert to_messages(request_after_calls()["input"])[3:] == [
        {
            "role": "assistant", "content": "I will look.", "reasoning": "I should list them.",
            "tool_calls": [
                {"id": "call_1_0", "type": "function",
                 "function": {"name": "shell", "arguments": '{"command":["bash","-lc","ls"]}'}},
                {"id": "call_1_1", "type": "function",
                 "function": {"name": "mcp__docs__search", "arguments": '{"query":"files"}'}},
            ],
        },
        {"role": "tool", "tool_call_id": "call_1_0", "content": "Exit code: 0\nOutput:\nREADME.md\n"},
        {"role": "tool", "tool_call_id": "call_1_1", "content": "nothing found"},
    ]  # fmt: skip


def test_turns_of_the_assistant_stay_apart() -> None:
    said = {"role": "assistant", "content": "a"}
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}
    found = to_messages([USER, said, said, thought, USER, thought, said])
    assert [(m["role"], m["content"], m.get("reasoning")) for m in found] == [
        ("user", "hi", None), ("assistant", "a", ""), ("assistant", "a", ""), ("assistant", "", "s"),
        ("user", "hi", None), ("assistant", "a", "s"),
    ]  # fmt: skip


@pytest.mark.parametrize("before", ["", "data:text/plain;base64,", "data:;base64,"])
def test_a_file_in_the_request_is_its_text(before: str) -> None:
    data = before + base64.b64encode("\ufeffStraße\n".encode()).decode()
    parts = [{"type": "input_file", "file_data": data, "filename": "a.txt"}, {"type": "input_text", "text": "What?"}]
    assert to_messages([{"role": "user", "content": parts}]) == [{"role": "user", "content": "Straße\n\nWhat?"}]


def test_instructions_are_a_message_or_come_before_the_question() -> None:
    assert with_instructions([USER], "Be brief.", False) == [{"role": "system", "content": "Be brief."}, USER]
    assert with_instructions([USER], None, False) == [USER]
    parts = [{"type": "input_file", "file_id": DOCUMENT}, {"type": "input_text", "text": "What?"}]
    (message,) = with_instructions(to_messages([{"role": "user", "content": parts}]), "Be brief.", False)
    assert message["content"] == [
        {"type": "text", "text": "Be brief."}, {"type": "file", "file": {"file_id": DOCUMENT}},
        {"type": "text", "text": "What?"},
    ]  # fmt: skip


def test_instructions_are_a_message_beside_other_files() -> None:
    file, text = {"type": "input_file", "file_id": DOCUMENT}, {"type": "input_text", "text": "What?"}
    system = {"role": "system", "content": "Be brief."}
    for items in ([*message(file, text), USER], message(file, file), [{"role": "system", "content": [file]}]):
        assert with_instructions(to_messages(items), "Be brief.", False)[0] == system
    assert with_instructions(to_messages(message(file, text)), "Be brief.", True)[0] == system


def message(*parts: object) -> list[Any]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize(("value", "param"), [
    (5, "input"), ([1], "input[0]"), ([{}], "input[0].type"), ([USER, {"type": "item_reference"}], "input[1].type"),
    ([{"role": "robot", "content": "x"}], "input[0].role"), ([{"role": [], "content": "x"}], "input[0].role"),
    ([{"role": "user"}], "input[0].content"), ([{"role": "user", "content": 5}], "input[0].content"),
    (message("x"), "input[0].content[0].type"), (message({"type": "input_image"}), "input[0].content[0].type"),
    (message({"type": {}}), "input[0].content[0].type"),
    (message({"type": "input_text"}), "input[0].content[0].text"),
    (message({"type": "input_file"}), "input[0].content[0].file_id"),
    (message({"type": "input_file", "file_url": "http://a"}), "input[0].content[0].file_url"),
    (message({"type": "input_file", "file_data": "§"}), "input[0].content[0].file_data"),
    (message({"type": "input_file", "file_data": "/w=="}), "input[0].content[0].file_data"),
    (message({"type": "input_file", "file_data": 5}), "input[0].content[0].file_data"),
    ([{"role": "assistant", "content": [{"type": "input_file", "file_id": DOCUMENT}]}], "input[0].content"),
    ([{"type": "function_call", "name": "f", "arguments": {}}], "input[0].arguments"),
    ([{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id"),
    ([{"type": "function_call_output", "call_id": "c"}], "input[0].output"),
    ([{"type": "function_call_output", "output": "c"}], "input[0].call_id"),
    ([{"type": "reasoning", "summary": "x"}], "input[0].summary"),
    ([{"type": "reasoning", "content": [5]}], "input[0].content[0].text"),
    ([USER] * 5000, "input"),
])  # fmt: skip
def test_what_is_wrong_is_named(value: object, param: str) -> None:
    with pytest.raises(Exception) as caught:
        to_messages(value)
    shown = to_api_error(caught.value)
    assert (shown.status, shown.param) == (400, param)


def record_of(source: JobInput) -> JobRecord:
    return JobRecord(new_id("job"), JobState.QUEUED, JobSpec(source, AnswerOptions()), 1.0)


def test_the_items_of_a_stored_response() -> None:
    body = request_after_calls()
    messages = with_instructions(to_messages(body["input"]), body["instructions"], True)
    record = record_of(JobInput(messages=read_messages(messages)))
    found = listed_items(record, body["instructions"], split_names([DOCS]))
    assert [item["type"] for item in found] == [
        "message", "message", "message", "reasoning", "message", "function_call", "function_call",
        "function_call_output", "function_call_output",
    ]  # fmt: skip
    assert to_messages(found) == [
        {**one, "role": "system"} if one["role"] == "developer" else one for one in messages[1:]
    ]  # fmt: skip
    assert len({item["id"] for item in found}) == len(found)
    assert (found[6]["name"], found[6]["namespace"]) == ("search", "mcp__docs")


def test_the_items_of_a_question_about_a_file() -> None:
    record = record_of(JobInput(DOCUMENT, ("Be brief.\nWhat?",)))
    (item,) = listed_items(record, "Be brief.", {})
    assert item["content"] == [
        {"type": "input_file", "file_id": DOCUMENT}, {"type": "input_text", "text": "What?"},
    ]  # fmt: skip


def test_pages() -> None:
    items = [{"id": f"i{n}"} for n in range(5)]
    first = page(items, "", 2, newest_first=True)
    assert (first["data"], first["has_more"]) == ([{"id": "i4"}, {"id": "i3"}], True)
    assert (first["first_id"], first["last_id"]) == ("i4", "i3")
    last = page(items, "i2", 2, newest_first=False)
    assert (last["data"], last["has_more"]) == ([{"id": "i3"}, {"id": "i4"}], False)
    assert page(items, "i4", 2, newest_first=False)["last_id"] is None
    with pytest.raises(ApiError, match="must be the id of an item"):
        page(items, "x", 2, newest_first=False)
