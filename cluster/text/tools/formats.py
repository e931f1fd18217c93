"""Which form of tool calls a model uses."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable

from cluster.text.tools.events import AnswerText, ScannedText
from cluster.text.tools.qwen3_json import QwenJsonScanner
from cluster.text.tools.qwen3_xml import FUNCTION_OPEN, QwenXmlScanner
from cluster.text.tools.scanner import CALL_OPEN, ToolScanner
from protos.jobs.chat import AUTO, Tool, ToolChoice


class ToolFormat(enum.StrEnum):
    """The form of tool calls in answers."""

    NONE = "none"  # the model's answers are text, whatever they have in them
    QWEN3_JSON = "qwen3_json"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>
    QWEN3_XML = "qwen3_xml"  # <tool_call><function=...><parameter=...>...</parameter></function></tool_call>


def tool_format(tool_parser: str, chat_template: str | None) -> ToolFormat:
    """Return the form that `model.tool_parser` names; `auto` is the one that the chat template shows to the model."""
    if tool_parser != "auto":
        return ToolFormat(tool_parser)
    template = chat_template or ""
    if FUNCTION_OPEN in template:
        return ToolFormat.QWEN3_XML
    return ToolFormat.QWEN3_JSON if CALL_OPEN in template else ToolFormat.NONE


def make_scanner(form: ToolFormat, tools: Iterable[Tool], choice: ToolChoice = AUTO) -> ToolScanner | None:
    """Return a scanner for one answer; None where nothing is looked for: no tools, none to be called, or no form."""
    schemas = {tool.name: json.loads(tool.parameters or "{}") for tool in tools}
    if not schemas or form is ToolFormat.NONE or choice.mode == "none":
        return None
    return QwenJsonScanner() if form is ToolFormat.QWEN3_JSON else QwenXmlScanner(schemas)


def scan_answer(text: str, form: ToolFormat, tools: Iterable[Tool], choice: ToolChoice = AUTO) -> ScannedText:
    """Return text and calls of a whole answer, as a scanner finds them piece by piece."""
    scanner, found = make_scanner(form, tools, choice), ScannedText()
    found.add([AnswerText(text)] if scanner is None else [*scanner.push(text), *scanner.flush()])
    return found
