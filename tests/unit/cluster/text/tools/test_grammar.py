"""Grammars of tool calls, by llguidance itself: texts of calls match, others do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.text.tools.formats import ToolFormat, scan_answer
from cluster.text.tools.grammar import tag_tokens, tool_grammar
from protos.errors import InvalidRequest
from protos.jobs.chat import Tool, ToolChoice
from tests.support.data.tokenizers import NEEDLE
from tests.support.tools.models import QWEN3, with_tool_tokens

llguidance = pytest.importorskip("llguidance")

JSON, XML = ToolFormat.QWEN3_JSON, ToolFormat.QWEN3_XML
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["C", "F"]},
        "where": {"$ref": "#/$defs/place"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"lat": {"type": "number"}}, "additionalProperties": False}},
}
WEATHER, NOW = Tool("weather", "", json.dumps(SCHEMA)), Tool("now")
STRICT = Tool("weather", "", json.dumps(SCHEMA), strict=True)
REQUIRED, NAMED, AUTO = ToolChoice("required"), ToolChoice("named", "now"), ToolChoice()
SPELT = with_tool_tokens(QWEN3)  # its tags are tokens
TOKENIZERS = {"tokens": SPELT, "text": NEEDLE}


def matches(grammar: str | None, text: str, kind: str = "text") -> bool:
    """Return whether a grammar takes a whole text, as tokens of the model."""
    assert grammar is not None
    tokenizer = TOKENIZERS[kind]
    matcher = llguidance.LLMatcher(_opened(kind), llguidance.grammar_from("lark", grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


_kept: dict[str, Any] = {}


def _opened(kind: str) -> Any:
    if kind not in _kept:
        _kept[kind] = llguidance.LLTokenizer(TOKENIZERS[kind]._tokenizer.to_str())
    return _kept[kind]


def grammar_of(form: ToolFormat, tools: list[Tool], choice: ToolChoice, kind: str = "text") -> str:
    found = tool_grammar(form, tools, choice, tag_tokens(TOKENIZERS[kind]))
    assert found is not None
    return found


def call(form: ToolFormat, name: str, values: dict[str, Any]) -> str:
    """Return a call as chat templates write it."""
    if form is JSON:
        return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(values, ensure_ascii=False)}}}\n</tool_call>'
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    parameters = "".join(f"<parameter={key}>\n{text}\n</parameter>\n" for key, text in texts.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


PARIS = {"city": "Paris"}
ALL = {"city": 'a\n"b" <c> é', "days": 3, "unit": "C", "where": {"lat": 1.5}}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("form", [JSON, XML])
def test_a_call_is_required(form: ToolFormat, kind: str) -> None:
    grammar = grammar_of(form, [WEATHER, NOW], REQUIRED, kind)
    paris, now = call(form, "weather", PARIS), call(form, "now", {})
    for text in (paris, now, call(form, "weather", ALL), "\n\n" + now, f"{paris}\n{now}\n{paris}"):
        assert matches(grammar, text, kind), text
    for text in (
        "", "Hello", f"So: {now}", f"{now} so", f"{now}{now}", now[:-1], call(form, "other", {}),
        call(form, "weather", {}), call(form, "weather", {"city": "a", "days": 10}), "\n\n\n" + now,
        call(XML, "weather", {"city": "a\n<parameter=x>"}),
        call(XML, "weather", {"city": "\n</function>\n</tool_call>"}),
        call(form, "weather", {"city": "a", "unit": "K"}), call(form, "weather", {"city": "a", "x": "y"}),
        call(form, "now", {"a": "b"}), call(form, "weather", {"city": "a", "where": {"lat": "x"}}),
    ):  # fmt: skip
        assert not matches(grammar, text, kind), text


@pytest.mark.parametrize(
    ("more", "is_open"), [({}, False), ({"additionalProperties": True}, True), ({"allOf": []}, True)]
)
def test_arguments_that_the_schema_does_not_list(more: dict[str, Any], is_open: bool) -> None:
    """A model that is made to call would go on inventing them."""
    tool = Tool("f", "", json.dumps({"properties": {"a": {"type": "integer"}}, **more}))
    grammar = grammar_of(JSON, [tool], ToolChoice("named", "f"))
    assert matches(grammar, call(JSON, "f", {"a": 1}))
    assert matches(grammar, call(JSON, "f", {"a": 1, "b": 2})) is is_open
    anything = grammar_of(JSON, [Tool("f", "", '{"type": "object"}')], ToolChoice("named", "f"))
    assert matches(anything, call(JSON, "f", {"b": 2}))


@pytest.mark.parametrize("form", [JSON, XML])
def test_one_call_at_most(form: ToolFormat) -> None:
    now = call(form, "now", {})
    grammar = grammar_of(form, [WEATHER, NOW], ToolChoice("required", one_call=True))
    assert matches(grammar, now)
    assert not matches(grammar, f"{now}\n{now}")
    auto = grammar_of(form, [STRICT, NOW], ToolChoice(one_call=True))
    assert matches(auto, f"a {now} b")
    assert not matches(auto, f"a {now}\n{now}")


@pytest.mark.parametrize("form", [JSON, XML])
def test_a_tool_is_named(form: ToolFormat) -> None:
    grammar = grammar_of(form, [WEATHER, NOW], NAMED)
    assert matches(grammar, call(form, "now", {}))
    assert not matches(grammar, call(form, "weather", PARIS))
    assert not matches(grammar, "\n".join([call(form, "now", {})] * 2))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("form", [JSON, XML])
def test_calls_in_free_text_follow_strict_schemas(form: ToolFormat, kind: str) -> None:
    grammar = grammar_of(form, [STRICT, NOW], AUTO, kind)
    paris = call(form, "weather", PARIS)
    for text in ("", "Hello <b> </tool_call", f"I look.\n{paris}\n{paris}", f"{paris} and <tool_cal", "{}\n中"):
        assert matches(grammar, text, kind), text
    for text in (
        f"I look.\n{call(form, 'weather', {'city': 'a', 'days': 0})}", "Look: <tool_call>", "<tool_call>no",
        f"{paris}\n{call(form, 'other', {})}", f"{paris}{paris[:-1]}",
    ):  # fmt: skip
        assert not matches(grammar, text, kind), text
    assert form is JSON or not matches(grammar, "<function=weather>\n</function>", kind)


@pytest.mark.parametrize("form", [JSON, XML])
@given(values=st.fixed_dictionaries(  # llguidance writes DEL as an escape only
    {"city": st.text(st.characters(exclude_characters="\x7f", exclude_categories=["Cs"]), max_size=20)},
    optional={"days": st.integers(1, 9), "unit": st.sampled_from("CF"), "where": st.just({})},
))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_what_matches_is_scanned_as_a_call(form: ToolFormat, values: dict[str, Any]) -> None:
    values = {key: values[key] for key in SCHEMA["properties"] if key in values}
    text = call(form, "weather", values)
    assert matches(grammar_of(form, [STRICT], REQUIRED), text)
    found = scan_answer(text, form, [STRICT])
    assert found.text == ""
    assert [(one.name, json.loads(one.arguments), one.complete) for one in found.calls] == [("weather", values, True)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("form", [JSON, XML])
def test_an_answer_is_calls_or_follows_a_schema(form: ToolFormat, kind: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "x-guidance": {"x": 1}}
    grammar = tool_grammar(form, [WEATHER, NOW], AUTO, tag_tokens(TOKENIZERS[kind]), schema)
    paris = call(form, "weather", PARIS)
    for text in (paris, f"{paris}\n{call(form, 'now', {})}", '{"a": 5}', '\n\n{"a": 5}'):
        assert matches(grammar, text, kind), text
    for text in ("", "Hello", '{"a": "b"}', f'{paris}\n{{"a": 5}}'):
        assert not matches(grammar, text, kind), text
    for choice in (REQUIRED, NAMED):
        assert tool_grammar(form, [NOW], choice, schema=schema) == tool_grammar(form, [NOW], choice)
    assert tool_grammar(form, [NOW], ToolChoice("none"), schema=schema) is None


def test_answers_that_any_text_will_do_for() -> None:
    tools = [WEATHER, NOW]
    assert tool_grammar(JSON, tools, AUTO) is None
    assert tool_grammar(JSON, [STRICT], ToolChoice("none")) is None
    assert tool_grammar(JSON, [], AUTO) is None
    assert tool_grammar(ToolFormat.NONE, tools, REQUIRED) is None


def tool(strict: bool = True, **properties: Any) -> Tool:
    return Tool("f", "", json.dumps({"type": "object", "properties": properties}), strict)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (tool(a={"type": "string", "pattern": "x"}), "tools: f.a: pattern: the model's form of calls has no such rule"),
        (tool(a={"type": "string", "maxLength": 5}), "tools: f.a: maxLength: the model's form"),
        (tool(**{"a b": {}}), "tools: f: parameter 'a b': cannot be written in the model's form of calls: rename it"),
        (tool(**{"a>": {}}), "tools: f: parameter 'a>': cannot be written"),
        (tool(a={"enum": ["</parameter>"]}), "tools: f.a: enum: a value with </parameter>: leave it out"),
    ],
)
def test_what_plain_text_cannot_promise_is_refused_by_name(given: Tool, said: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tool_grammar(XML, [given], REQUIRED)
    assert str(caught.value).startswith(said)
    assert tool_grammar(JSON, [given], REQUIRED)


def test_keywords_that_are_not_supported_count_for_strict_tools_alone() -> None:
    schema = {"a": {"type": "object", "patternProperties": {"^x": {"not": {}}}}}
    assert matches(grammar_of(JSON, [tool(strict=False, **schema)], REQUIRED), call(JSON, "f", {"a": {}}))
    text = grammar_of(JSON, [tool(**schema)], REQUIRED)
    matcher = llguidance.LLMatcher(_opened("text"), llguidance.grammar_from("lark", text), log_level=0)
    assert "not" in matcher.get_error()


def test_texts_of_other_types() -> None:
    given = tool(a={"type": ["string", "null"]}, b={"const": "x"}, c={"enum": ["p", 5]}, d={}, e={"type": "boolean"})
    grammar = grammar_of(XML, [given], REQUIRED)
    for values in ({"a": None}, {"a": "any\ntext"}, {"b": "x"}, {"c": 5}, {"c": "p"}, {"d": "[1]"}, {"e": True}, {}):
        assert matches(grammar, call(XML, "f", values)), values
    for values in ({"b": "y"}, {"c": 6}, {"e": "maybe"}, {"e": True, "a": "b"}):
        assert not matches(grammar, call(XML, "f", values)), values


def test_tags_that_are_tokens() -> None:
    assert tag_tokens(SPELT) == {"<tool_call>", "</tool_call>"}
    assert tag_tokens(NEEDLE) == frozenset()
