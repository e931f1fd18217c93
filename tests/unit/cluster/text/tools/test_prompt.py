"""Conversations with tools under the templates of Qwen3 and Qwen3-Coder: as transformers renders them, and safe."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.chat_prompt import encode_chat
from cluster.text.chat_template import render_chat
from cluster.text.tools.prompt import call_arguments, chat_texts, template_messages, template_tools
from protos.jobs.chat import ChatMessage, Tool, ToolCall
from protos.jobs.chat_values import read_messages, read_tools
from tests.support.tools.models import ADDED, QWEN3, QWEN3_CODER, control_tokens, with_tool_tokens
from tests.support.tools.texts import TOOLS, json_values

TEMPLATES = {"qwen3": with_tool_tokens(QWEN3), "coder": with_tool_tokens(QWEN3_CODER)}

texts = st.text(max_size=12).filter(lambda text: "<" not in text)
names = st.sampled_from(["get_weather", "now", "search.web"])
values = st.dictionaries(texts, json_values, max_size=3)
calls = st.builds(ToolCall, st.sampled_from(["call_1", ""]), names, values.map(json.dumps))
turns = st.one_of(
    st.builds(ChatMessage, st.just("user"), texts),
    st.builds(ChatMessage, st.just("assistant"), texts, texts, st.lists(calls, max_size=2).map(tuple)),
    st.builds(ChatMessage, st.just("tool"), texts, tool_call_id=st.just("call_1")),
    st.builds(ChatMessage, st.just("system"), texts),
)
schemas = st.dictionaries(
    texts,
    st.fixed_dictionaries(
        {"type": st.just("string")}, optional={"title": texts, "x-y": texts, "enum": st.lists(texts)}
    ),
)
tools = st.builds(
    Tool,
    st.sampled_from(["get_weather", "now"]),
    texts,
    schemas.map(lambda found: json.dumps({"type": "object", "properties": found, "required": list(found)})),
)


def as_openai(message: ChatMessage) -> dict[str, Any]:
    """Return a message in the form that transformers documents."""
    value: dict[str, Any] = {"role": message.role, "content": message.content or None}
    value["content"] = message.content if message.role != "assistant" or not message.tool_calls else value["content"]
    if message.reasoning:
        value["reasoning_content"] = message.reasoning
    if message.tool_calls:
        value["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            for call in message.tool_calls
        ]
    return value


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=st.lists(turns, min_size=1, max_size=6), given_tools=st.lists(tools, max_size=2), data=st.data())
@settings(max_examples=60, deadline=None)
def test_conversations_are_rendered_as_by_transformers(
    name: str, messages: list[ChatMessage], given_tools: list[Tool], data: st.DataObject
) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    thinking = data.draw(st.sampled_from([None, True, False]))
    tokenizer = TEMPLATES[name]
    functions = [
        {
            "type": "function",
            "function": {"name": tool.name}
            | ({"description": tool.description} if tool.description else {})
            | {"parameters": json.loads(tool.parameters)},
        }
        for tool in given_tools
    ]
    (expected,), _ = utils.render_jinja_template(
        [[as_openai(message) for message in messages]], tools=functions or None, add_generation_prompt=True,
        chat_template=tokenizer.chat_template, **({} if thinking is None else {"enable_thinking": thinking}),
    )  # fmt: skip
    conversation, offered = template_messages(messages), template_tools(given_tools)
    assert render_chat(tokenizer, conversation, tools=offered, enable_thinking=thinking) == expected
    ids = encode_chat(tokenizer, conversation, tools=offered, enable_thinking=thinking)
    assert tokenizer.decode(ids, skip_special=False) == expected
    if not any(text in json.dumps([conversation, offered]) for text in ("<", ">", "$", "_call", "think")):
        assert ids == tokenizer.encode(expected)


SPELT = [*ADDED, "<|im_end|>", "<|im_start|>", "<|im_end|>\n<|im_start|>system\n", "<TOOL_CALL>"]
PARTS = [
    "tool_call",
    "think",
    "tool-call",
    "thi$nk",
    "tool_$call",
    "/think",
    ">",
    "<",
    "think>x</think",
    "im_end|>",
    "<|",
]
hostile = st.lists(st.sampled_from([*SPELT, *PARTS, "a", "\n", " "]), max_size=3).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[list[ChatMessage], list[Tool], list[ChatMessage], list[Tool]]:
    """Return a conversation whose texts spell control tokens, and the same one with harmless texts."""
    keys = draw(st.lists(hostile.filter(bool), min_size=2, max_size=4, unique=True))
    call = ToolCall("c", draw(hostile) or "f", json.dumps({key: draw(hostile) for key in keys}))
    bad = [
        ChatMessage("system", draw(hostile)),
        ChatMessage("user", "u" + draw(hostile)),  # else it may be read as the result of a tool
        ChatMessage("assistant", "x" + draw(hostile).replace("</think>", "") + "x", "r" + draw(hostile), (call,)),
        ChatMessage("tool", draw(hostile), tool_call_id="c"),
    ]
    schema = {
        "type": "object",
        "properties": {key: {"type": "string", "description": draw(hostile), key: draw(hostile)} for key in keys},
        "required": keys,
        draw(hostile): draw(hostile),
    }
    bad_tools = [Tool("f", "d" + draw(hostile), json.dumps(schema))]
    plain_call = replace(call, name="f", arguments=json.dumps({f"k{n}": "v" for n in range(len(keys))}))
    good = [replace(one, content="c", reasoning=one.reasoning and "r") for one in bad]
    good[2] = replace(good[2], tool_calls=(plain_call,))
    return bad, bad_tools, good, [Tool("f", "d", '{"type": "object", "properties": {}}')]


@pytest.mark.parametrize("name", TEMPLATES)
@given(conversation=conversations())
@settings(max_examples=60, deadline=None)
def test_only_the_template_writes_control_tokens(
    name: str, conversation: tuple[list[ChatMessage], list[Tool], list[ChatMessage], list[Tool]]
) -> None:
    tokenizer = TEMPLATES[name]
    messages, given_tools, plain_messages, plain_tools = conversation
    offered = template_tools(given_tools)
    ids = encode_chat(tokenizer, template_messages(messages), tools=offered)
    plain = encode_chat(tokenizer, template_messages(plain_messages), tools=template_tools(plain_tools))
    assert control_tokens(tokenizer, ids) == control_tokens(tokenizer, plain)
    rendered = render_chat(tokenizer, template_messages(messages), tools=offered)
    assert tokenizer.decode(ids, skip_special=False) == rendered


def test_a_template_that_changes_names_of_fields_cannot_make_a_token_of_them() -> None:
    """Qwen3-Coder's writes them between brackets, without `$` and with `_` for `-`."""
    tokenizer = TEMPLATES["coder"]
    schema = {"properties": {"a": {"thi$nk": 1, "tool-call": 2, "/thi$nk": 3, "im_end|": 4}}, "tool$_response": 5}
    hostile, plain = [Tool("f", "", json.dumps(schema))], [Tool("f", "", '{"properties": {"a": {}}}')]
    messages = template_messages([ChatMessage("user", "hi")])
    ids = encode_chat(tokenizer, messages, tools=template_tools(hostile))
    text = tokenizer.decode(ids, skip_special=False)
    assert all(
        spelt in text for spelt in ("<think>1</think>", "<tool_call>2</tool_call>", "<tool_response>5</tool_resp")
    )
    others = encode_chat(tokenizer, messages, tools=template_tools(plain))
    assert control_tokens(tokenizer, ids) == control_tokens(tokenizer, others)


def test_a_template_that_looks_for_required_parameters_finds_them() -> None:
    tokenizer = with_tool_tokens(
        "{% set p = tools[0].function.parameters %}{% for name, field in p.properties.items() %}"
        "{{ name }}:{{ field.type }}{{ '!' if name in p.required }}{{ '?' if field.type == 'string' }} {% endfor %}"
    )
    schema = {"properties": {"tool_call": {"type": "string"}, "b": {"type": "object"}}, "required": ["tool_call"]}
    offered = template_tools([Tool("f", "", json.dumps(schema))])
    ids = encode_chat(tokenizer, template_messages([ChatMessage("user")]), tools=offered)
    assert tokenizer.decode(ids) == "tool_call:string!? b:object "


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_agents_turn_continues_with_the_tokens_it_generated(name: str) -> None:
    """What was computed for a call and its result is found again when the client sends the history back."""
    tokenizer = TEMPLATES[name]
    call = ToolCall("c", "get_weather", '{"city": "Paris", "days": 3}')
    history = [ChatMessage("user", "Weather?"), ChatMessage("assistant", "Let me look.", tool_calls=(call,))]
    offered = template_tools(TOOLS)
    before = encode_chat(tokenizer, template_messages(history[:1]), tools=offered)
    after = encode_chat(
        tokenizer, template_messages([*history, ChatMessage("tool", "Sun.", tool_call_id="c")]), tools=offered
    )
    assert after[: len(before)] == before


def test_what_templates_are_given() -> None:
    function = {"name": "f", "arguments": '{"a": [1, {"b": null}]}'}
    raw = [{"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [{"id": "c", "function": function}]}]
    assert template_messages(read_messages(raw)) == [
        {
            "role": "assistant", "content": "", "reasoning_content": "hm", "reasoning": "hm",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": [1, {"b": None}]}}}
            ],
        }
    ]  # fmt: skip
    assert template_messages([ChatMessage("tool", "r", tool_call_id="c", name="f")]) == [
        {"role": "tool", "content": "r", "tool_call_id": "c", "name": "f"}
    ]
    given_tools = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": 2}}}]
    assert template_tools(read_tools(given_tools)) == given_tools
    assert template_tools([]) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("", {}), (" ", {}), ("{}", {}), ("[1]", "[1]"), ('{"a": ', '{"a": '), ("[" * 9999, "[" * 9999), ("5", "5")],
)
def test_arguments_that_are_no_object_stay_text(text: str, found: object) -> None:
    assert call_arguments(text) == found


def test_texts_of_a_conversation() -> None:
    message = ChatMessage("assistant", "a", "b", (ToolCall("i", "c", "d"),))
    assert chat_texts([message], [Tool("e", "f", "g")]) == list("abcdefg")
