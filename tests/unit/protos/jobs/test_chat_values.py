from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.errors import InvalidRequest
from protos.jobs.chat import ChatMessage, Tool, ToolCall, ToolChoice, check_chat
from protos.jobs.chat_values import read_messages, read_tool_choice, read_tools

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_messages_as_clients_send_them() -> None:
    messages = read_messages([
        ("user", "a"),
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "input_text", "text": "c"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"é": 1.5}}}], "reasoning": "r"},
        {"role": "assistant", "content": "d", "reasoning_content": "hm", "tool_calls": None, "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": [{"type": "output_text", "text": "e"}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "reasoning": None},
        {"role": "assistant", "content": "", "tool_calls": [{"id": None, "function": {"name": "f"}}]},
    ])  # fmt: skip
    assert messages == (
        ChatMessage("user", "a"),
        ChatMessage("system", "rules"),
        ChatMessage("user", "b\nc"),
        ChatMessage("assistant", tool_calls=(ToolCall("c1", "f", '{"a": 1}'),)),
        ChatMessage("assistant", "", "r", (ToolCall("", "f", '{"é": 1.5}'),)),
        ChatMessage("assistant", "d", "hm"),
        ChatMessage("tool", "e", tool_call_id="c1", name="f"),
        ChatMessage("assistant", "no"),
        ChatMessage("assistant", tool_calls=(ToolCall("", "f", ""),)),
    )
    check_chat(messages)


def test_unknown_fields_are_refused_or_ignored() -> None:
    value = [{"role": "user", "content": "a", "reasoning": "not a user's", "audio": {}, 5: 6}]
    assert read_messages(value, ignore_unknown=True) == (ChatMessage("user", "a"),)
    with pytest.raises(InvalidRequest, match=r"\Amessages\[0\].5: must be one of content, name, reasoning, "):
        read_messages(value)


def test_tools_as_clients_send_them() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}
    tool = Tool("f", "d", '{"type": "object", "properties": {"b": {}, "a": {}}}')
    assert read_tools([{"type": "function", "function": function}]) == (tool,)
    assert read_tools([{"type": "function", **function, "strict": None}]) == (tool,)  # flat
    assert read_tools([{"type": "function", "function": {"name": "g", "strict": True, "parameters": None}}]) == (
        Tool("g", strict=True),
    )
    assert read_tools(None) == read_tools([]) == ()


def test_choices_as_clients_send_them() -> None:
    assert read_tool_choice(None) == read_tool_choice("auto", True) == ToolChoice()
    assert read_tool_choice("required", False) == ToolChoice("required", one_call=True)
    named = ToolChoice("named", "f")
    assert read_tool_choice({"type": "function", "function": {"name": "f"}}) == named
    assert read_tool_choice({"type": "function", "name": "f"}) == named


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: read_messages("hi"), "messages: 'hi': must be a list of at least one message"),
    (lambda: read_messages([]), "messages: []: must be a list of at least one message"),
    (lambda: read_messages([("a", "b", "c")]), "messages[0]: ('a', 'b', 'c'): must have role and content"),
    (lambda: read_messages([{"role": "user"}]), "messages[0]: {'role': 'user'}: must have role and content"),
    (lambda: read_messages([{"role": 5, "content": ""}]), "messages[0].role: 5: must be text"),
    (lambda: read_messages([("user", 5)]), "messages[0].content: 5: must be text"),
    (lambda: read_messages([("user", "\ud800")]), "messages[0].content: character '\\ud800' at 0: must be text that"),
    (lambda: read_messages([("user", [{"type": "image_url"}])]), "messages[0].content[0].type: 'image_url': must be"),
    (lambda: read_messages([("user", ["a"])]), "messages[0].content[0].type: None: must be text"),
    (lambda: read_messages([("user", [{"type": "text"}])]), "messages[0].content[0].text: None: must be text"),
    (lambda: read_messages([{"role": "assistant", "tool_calls": 5}]), "messages[0].tool_calls: 5: must be a list"),
    (lambda: read_messages([{"role": "assistant", "tool_calls": [{}]}]), "messages[0].tool_calls[0].function: None"),
    (lambda: read_messages([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}]),
     "messages[0].tool_calls[0].function.arguments: 5: must be text"),
    (lambda: read_messages([{"role": "assistant", "reasoning": 5}]), "messages[0].reasoning: 5: must be text"),
    (lambda: read_tools({}), "tools: {}: must be a list of functions"),
    (lambda: read_tools([{"type": "web_search"}]), "tools[0].type: 'web_search': must be function"),
    (lambda: read_tools([5]), "tools[0].type: None: must be function"),
    (lambda: read_tools([{"type": "function", "function": 5}]), "tools[0].function: 5: must have a name"),
    (lambda: read_tools([{"type": "function"}]), "tools[0].name: None: must be text"),
    (lambda: read_tools([{"name": "f", "parameters": []}]), "tools[0].parameters: []: must be a JSON schema"),
    (lambda: read_tools([{"name": "f", "parameters": {"a": {1}}}]), "tools[0].parameters: {'a': {1}}: must be JSON"),
    (lambda: read_tools([{"name": "f", "strict": 1}]), "tools[0].strict: 1: must be True or False"),
    (lambda: read_tool_choice("named"), "tool_choice: 'named': must be auto, none, required or a function"),
    (lambda: read_tool_choice({"type": "function"}), "tool_choice: {'type': 'function'}: must have the type function"),
    (lambda: read_tool_choice(5), "tool_choice: 5: must be text"),
    (lambda: read_tool_choice("auto", "no"), "parallel_tool_calls: 'no': must be True or False"),
]  # fmt: skip


@pytest.mark.parametrize(("read", "said"), BAD, ids=range(len(BAD)))
def test_bad_values_are_named(read: Callable[[], object], said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read()
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "function", "name", "tool_calls"]), inner, max_size=4
        )
    ),
)


@given(value=json_like)
def test_any_json_is_read_or_refused(value: object) -> None:
    for read in (read_messages, read_tools, read_tool_choice):
        with contextlib.suppress(InvalidRequest):
            read(value)
