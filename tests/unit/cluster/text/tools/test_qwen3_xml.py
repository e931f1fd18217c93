from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.text.tools.events import AnswerText, CallArguments, CallEnded, CallStarted, FoundCall
from cluster.text.tools.qwen3_xml import QwenXmlScanner
from tests.support.tools.texts import WEATHER, json_values, scan

SCHEMAS: dict[str, Any] = {"get_weather": WEATHER, "now": {}}

strings = st.text(max_size=12).filter(lambda text: "</parameter>" not in text)
objects = st.dictionaries(st.text(max_size=5), json_values, max_size=3)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "city": strings,
        "days": st.integers(),
        "wet": st.booleans(),
        "share": st.floats(allow_nan=False, allow_infinity=False),
        "where": objects,
        "note": st.none() | strings.filter(lambda text: text.strip().lower() not in ("null", "none")),
        "other": strings,  # not in the schema
    },
)


def written(name: str, values: dict[str, Any]) -> str:
    """Return a call as the template of Qwen3-Coder writes it."""
    parts = [
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in values.items()
    ]
    return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"


@given(calls=st.lists(st.tuples(st.sampled_from(["get_weather", "other"]), arguments), min_size=1, max_size=3))
def test_calls_as_the_template_writes_them(calls: list[tuple[str, dict[str, Any]]]) -> None:
    calls = [(name, values if name == "get_weather" else {}) for name, values in calls]
    # what a closing tag in a string would end
    assert not any("</parameter>" in json.dumps(values.get("where"), ensure_ascii=False) for _, values in calls)
    found = scan(QwenXmlScanner(SCHEMAS), list("\n".join(written(*call) for call in calls)))
    assert found.text == ""
    assert [(call.name, json.loads(call.arguments), call.complete) for call in found.calls] == [
        (name, values, True) for name, values in calls
    ]


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("city", "12", "12"), ("city", "", ""), ("city", "\n a \n", "\n a \n"), ("city", '"q" \\', '"q" \\'),
        ("unknown", "5", "5"), ("days", " 12 ", 12), ("days", "1.5", "1.5"), ("days", "twelve", "twelve"),
        ("wet", "True", True), ("wet", "yes", "yes"), ("share", "1", 1), ("share", "0.5", 0.5), ("share", "NaN", "NaN"),
        ("where", "{'a': (1, None)}", {"a": [1, None]}), ("where", "{1: 2}", {"1": 2}), ("where", "{'a'}", "{'a'}"),
        ("where", "[1]", "[1]"), ("where", "[" * 5000, "[" * 5000), ("tags", '["a"]', ["a"]), ("tags", "['a']", ["a"]),
        ("where", "{'a': 1e999}", "{'a': 1e999}"), ("note", "null", None), ("note", "None", None), ("note", "5", "5"),
    ],
)  # fmt: skip
def test_values_have_the_types_of_the_schema(key: str, value: str, expected: object) -> None:
    text = written("get_weather", {key: value})
    found = scan(QwenXmlScanner(SCHEMAS), list(text))
    assert found.calls[0].complete
    assert json.loads(found.calls[0].arguments) == {key: expected}
    assert type(json.loads(found.calls[0].arguments)[key]) is type(expected)


@pytest.mark.parametrize(
    ("text", "arguments", "complete"),
    [
        ("<tool_call><function=now></function></tool_call>", "{}", True),
        ("<function=now></function>", "{}", True),
        ("<tool_call>\n<function=now>\n</tool_call>", "{}", False),  # without an end of the function
        ("<function=now><parameter=a>\n</parameter></function></tool_call>", '{"a": ""}', True),
        ("<function=now><parameter=a>b\n</parameter>\n</tool_call>", '{"a": "b"}', False),
        ("<function=now>\n<parameter=a>\nb\n<parameter=c>\nd\n</function>\n</tool_call>", '{"a": "b", "c": "d"}', True),
        (
            "<function=now>\n<parameter=a>\n</function>\n<parameter>\n</parameter></function>",
            '{"a": "</function>\\n<parameter>"}',
            True,
        ),
        ("<function=now><parameter=a>\nb", '{"a": "b', False),  # the answer breaks off
        ("<function=now><parameter=a>\nb</param", '{"a": "b</param', False),
        ("<function=now><parameter=a>\nb</parameter>", '{"a": "b"', False),
        ("<function=get_weather><parameter=days>\n1", '{"days": ', False),
        ("<function=now><parameter=a", "", False),
    ],
)
def test_forms_of_a_call(text: str, arguments: str, complete: bool) -> None:
    found = scan(QwenXmlScanner(SCHEMAS), list(text))
    name = "now" if "now" in text else "get_weather"
    assert (found.text, found.calls) == ("", [FoundCall(name, arguments, complete)])


@pytest.mark.parametrize(
    "text",
    [
        "<function=unknown></function>", "<tool_call></tool_call>", "<tool_call>{}</tool_call>", "<function=",
        "<tool_call><function=></function></tool_call>", "<tool_call><function=a b></function></tool_call>",
        f"<tool_call><function={300 * 'n'}></function></tool_call>", "a < b, c > d; <function>", "<tool_call>\n<func",
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    found = scan(QwenXmlScanner(SCHEMAS), list(f"See {text}."))
    assert (found.text, found.calls) == (f"See {text}.", [])


def test_strings_come_as_they_are_written() -> None:
    scanner = QwenXmlScanner(SCHEMAS)
    assert scanner.push("Look.\n<tool_call>\n<function=get_weather") == [AnswerText("Look.")]
    assert scanner.push(">\n<parameter=city>\n") == [
        CallStarted(0, "get_weather"), CallArguments(0, '{"city": '), CallArguments(0, '"')
    ]  # fmt: skip
    assert scanner.push('Par"is\n</par') == [CallArguments(0, 'Par\\"is')]
    assert scanner.push("k\n") == [CallArguments(0, "\\n</park")]
    assert scanner.push("</parameter>\n<parameter=days>\n1") == [CallArguments(0, '"'), CallArguments(0, ', "days": ')]
    assert scanner.push("2\n</parameter></function>") == [
        CallArguments(0, "12"), CallArguments(0, "}"), CallEnded(0, True)
    ]  # fmt: skip


def test_text_behind_a_call_that_breaks_off() -> None:
    found = scan(QwenXmlScanner(SCHEMAS), list("<function=now><parameter=a>b</parameter> so</function>"))
    assert (found.text, found.calls) == ("so</function>", [FoundCall("now", '{"a": "b"}', False)])
