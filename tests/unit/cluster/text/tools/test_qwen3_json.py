from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.text.tools.events import CallArguments, CallStarted, FoundCall
from cluster.text.tools.qwen3_json import QwenJsonScanner
from tests.support.tools.texts import json_values, scan


@given(
    calls=st.lists(
        st.tuples(st.text(min_size=1, max_size=9), st.dictionaries(st.text(max_size=6), json_values, max_size=4)),
        min_size=1,
        max_size=3,
    ),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, None, 2]),
)
def test_calls_as_the_template_writes_them(
    calls: list[tuple[str, dict[str, Any]]], ascii_only: bool, indent: int | None
) -> None:
    written = [
        json.dumps({"name": name, "arguments": value}, ensure_ascii=ascii_only, indent=indent) for name, value in calls
    ]
    text = "\n".join(f"<tool_call>\n{one}\n</tool_call>" for one in written)
    found = scan(QwenJsonScanner(), list(text))
    assert found.text == ""
    assert [(call.name, json.loads(call.arguments), call.complete) for call in found.calls] == [
        (name, value, True) for name, value in calls
    ]
    assert all(call.arguments in one for call, one in zip(found.calls, written, strict=True))  # raw


OK = FoundCall("f", '{"a": 1}', True)


@pytest.mark.parametrize(
    ("inside", "call"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', OK),
        ('{"arguments": {"a": 1}, "name": "f"}', OK),
        ('{"id": [1, {"x": "}"}], "name": "f", "type": "function", "arguments": {"a": 1}, "more": 1.5}', OK),
        (r'{"name": "f", "arguments": "{\"a\": 1}"}', OK),
        ('{"name":"f"}', FoundCall("f", "{}", True)),
        ('{"name": "f", "arguments": {}}', FoundCall("f", "{}", True)),
        ('{"name": "f", "arguments": null}', FoundCall("f", "{}", True)),
        ('{"name": "f", }', FoundCall("f", "{}", True)),
        (r'{"name": "f\u00fc\n", "arguments": { }}', FoundCall("fü\n", "{ }", True)),
        (
            r'{"name": "f", "arguments": {"a": "\"}</tool_call>\\"}}',
            FoundCall("f", r'{"a": "\"}</tool_call>\\"}', True),
        ),
        ('{"name": "f", "arguments": {"a": {"b": [1, {}]}}', FoundCall("f", '{"a": {"b": [1, {}]}}', False)),
        ('{"name": "f", "arguments": {"a": ', FoundCall("f", '{"a": ', False)),
    ],
)
def test_forms_of_a_call(inside: str, call: FoundCall) -> None:
    text = f"<tool_call>\n{inside}\n</tool_call>"
    found = scan(QwenJsonScanner(), list(text))
    assert found.calls == [FoundCall(call.name, call.arguments + "\n" * (inside.endswith(": ")), call.complete)]
    assert found.text == ""


@pytest.mark.parametrize(
    "inside",
    [
        "", "f", "[]", "{}", '{"name": ""}', '{"name": 5}', '{"name": "f" "arguments": {}}', "{'name': 'f'}",
        '{"name": "f", "arguments": 5}', '{"name": "f", "arguments": [1]}', '{"name": "f", "arguments": {5: 1}}',
        r'{"name": "f", "arguments": "no"}', r'{"name": "\ud800"}', r'{"name": "\x"}', '{"arguments": {"a": 1}}',
        '{"name": "' + 2000 * "f" + '"}', '{"name": "' + 300 * "f" + '"}', '{"name": "f", "arguments": }',
        '{"name": "f", "arguments": ' + 5000 * "[" + "}",
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(inside: str) -> None:
    text = f"See <tool_call>{inside}</tool_call>."
    found = scan(QwenJsonScanner(), list(text))
    assert (found.text, found.calls) == (text, [])


def test_a_call_behind_a_tag_that_began_none() -> None:
    found = scan(QwenJsonScanner(), ['<tool_call>\n<tool_call>\n{"name": "f"}\n</tool_call>'])
    assert (found.text, found.calls) == ("<tool_call>", [FoundCall("f", "{}", True)])


def test_arguments_come_as_they_are_written() -> None:
    scanner = QwenJsonScanner()
    assert scanner.push('<tool_call>{"name": "f", "arguments": ') == []
    assert scanner.push('{"a') == [CallStarted(0, "f"), CallArguments(0, '{"a')]
    assert scanner.push('": "b') == [CallArguments(0, '": "b')]
    assert scanner.push("\\") == [CallArguments(0, "\\")]
    assert scanner.push('""') == [CallArguments(0, '""')]


def test_text_behind_arguments_that_are_no_json() -> None:
    found = scan(QwenJsonScanner(), list('<tool_call>{"name": "f", "arguments": {"a": <no>}} more'))
    assert (found.text, found.calls) == ("<no>}} more", [FoundCall("f", '{"a": ', False)])
