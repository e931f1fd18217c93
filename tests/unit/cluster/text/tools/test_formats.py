from __future__ import annotations

import pytest

from cluster.text.tools.formats import ToolFormat, make_scanner, scan_answer, tool_format
from protos.jobs.chat import Tool, ToolChoice
from tests.support.tools.texts import TOOLS

JSON_TEMPLATE, XML_TEMPLATE = "... <tool_call>\n{{ x }}", "<tool_call>\n<function=example_function_name>"


@pytest.mark.parametrize(
    ("tool_parser", "template", "form"),
    [
        ("auto", JSON_TEMPLATE, ToolFormat.QWEN3_JSON), ("auto", XML_TEMPLATE, ToolFormat.QWEN3_XML),
        ("auto", "{{ messages }}", ToolFormat.NONE), ("auto", None, ToolFormat.NONE),
        ("none", XML_TEMPLATE, ToolFormat.NONE), ("qwen3_json", None, ToolFormat.QWEN3_JSON),
        ("qwen3_xml", JSON_TEMPLATE, ToolFormat.QWEN3_XML),
    ],
)  # fmt: skip
def test_form_of_a_model(tool_parser: str, template: str | None, form: ToolFormat) -> None:
    assert tool_format(tool_parser, template) is form


def test_nothing_is_looked_for_without_tools_or_form() -> None:
    assert make_scanner(ToolFormat.NONE, TOOLS) is None
    assert make_scanner(ToolFormat.QWEN3_JSON, []) is None
    assert make_scanner(ToolFormat.QWEN3_JSON, TOOLS, ToolChoice("none")) is None
    text = '\n<tool_call>{"name": "now"}</tool_call>\n'
    assert scan_answer(text, ToolFormat.NONE, TOOLS).text == text
    found = scan_answer(text, ToolFormat.QWEN3_JSON, TOOLS)
    assert (found.text, [call.name for call in found.calls]) == ("", ["now"])


def test_a_tool_without_parameters() -> None:
    found = scan_answer("<function=f></function>", ToolFormat.QWEN3_XML, [Tool("f")])
    assert [call.arguments for call in found.calls] == ["{}"]
