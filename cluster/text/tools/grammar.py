"""Grammars of answers that must call tools, or whose calls must follow the schemas of strict tools.

They are texts in llguidance's variant of Lark: data for whoever constrains decoding. Calls have the spelling that the
scanners read and that the chat templates write, so that the next turn finds the same tokens again.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cluster.text.tokenizer import TextTokenizer
from cluster.text.tools.formats import ToolFormat
from cluster.text.tools.qwen3_xml import FUNCTION_CLOSE, FUNCTION_OPEN, NEXT_TAGS, PARAMETER_CLOSE, PARAMETER_OPEN
from cluster.text.tools.scanner import CALL_CLOSE, CALL_OPEN, MAX_NAME_CHARS
from cluster.text.tools.schema_types import json_types, properties
from protos.errors import InvalidRequest
from protos.jobs.chat import Tool, ToolChoice

_SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}  # of templates
_TEXT_KEYWORDS = ("pattern", "format", "minLength", "maxLength")  # of strings, which no rule for plain text can have
_OPEN = frozenset(
    {
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "allOf",
        "anyOf",
        "oneOf",
        "$ref",
        "if",
    }
)  # keywords of a schema whose names are not all under `properties`
_LEAD = r"LEAD: /\n{0,2}/"  # behind reasoning


def tag_tokens(tokenizer: TextTokenizer) -> frozenset[str]:
    """Return the tags of calls that are added tokens: llguidance takes all such names for special ones.

    No text in a grammar matches these tokens, only their names do; without them a model has to spell the tags.
    """
    return frozenset({CALL_OPEN, CALL_CLOSE}.intersection(tokenizer.added_texts))


def tool_grammar(
    form: ToolFormat, tools: Sequence[Tool], choice: ToolChoice, special: Collection[str] = frozenset(),
    schema: Mapping[str, Any] | None = None,
) -> str | None:  # fmt: skip
    """Return the grammar of an answer behind its reasoning; None where any text will do.

    Args:
        special: see `tag_tokens`.
        schema: of an answer without calls; one that may call tools is then either calls or such JSON.

    Raises:
        InvalidRequest: a strict tool has a keyword, or any tool a parameter, that the form of calls cannot have.
    """
    has_schema = choice.mode == "auto" and schema is not None
    is_free = choice.mode == "auto" and not has_schema and not any(tool.strict for tool in tools)
    if form is ToolFormat.NONE or not tools or is_free or choice.mode == "none":
        return None
    if choice.mode == "named":
        tools = [tool for tool in tools if tool.name == choice.name]
    write = _json_call if form is ToolFormat.QWEN3_JSON else _xml_call
    rules = [rule for index, tool in enumerate(tools) for rule in write(index, tool)]
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    body = f"body: ({calls}) {_tag(CALL_CLOSE, special)}"
    if form is ToolFormat.QWEN3_XML:
        barred = [tag.replace("\n", "\\n").replace("/", "\\/") for tag in NEXT_TAGS]
        rules += [f"text[suffix={_quote(PARAMETER_CLOSE)}]: PLAIN", f"PLAIN: /(?s:.*)/{_without(barred)}"]
    if choice.mode == "auto" and not has_schema:
        return "\n".join([*_free_text(form, choice.one_call, special), body, *rules]) + "\n"
    more = "" if choice.mode == "named" or choice.one_call else ' ("\\n" call)*'
    call = f"call: {_tag(CALL_OPEN, special)} body"
    start = f"start: LEAD call{more}"
    if has_schema and schema is not None:
        start = f"start: LEAD (call{more} | answer)"
        values = {key: value for key, value in schema.items() if key != "x-guidance"}
        rules.append("answer: %json " + json.dumps(values, ensure_ascii=False))
    return "\n".join([start, _LEAD, call, body, *rules]) + "\n"


def _free_text(form: ToolFormat, one_call: bool, special: Collection[str]) -> list[str]:
    """Return the rules of text with calls in it."""
    times = "?" if one_call else "*"
    barred = [FUNCTION_OPEN] if form is ToolFormat.QWEN3_XML else []  # the scanner takes it for a call
    if CALL_OPEN in special:
        return [f"start: (TEXT {_tag(CALL_OPEN, special)} body){times} TEXT", f"TEXT: /(?s:.*)/{_without(barred)}"]
    return [
        f"start: (before body){times} REST",
        "before[lazy]: BEFORE",
        f"BEFORE: /(?s:.*){CALL_OPEN}/{_without(barred)}",
        f"REST: /(?s:.*)/{_without([CALL_OPEN, *barred])}",
    ]


def _without(tags: Sequence[str]) -> str:
    return "".join(f" & ~/(?s:.*){tag}(?s:.*)/" for tag in tags)


def _json_call(index: int, tool: Tool) -> list[str]:
    before, after = _quote(f'\n{{"name": "{tool.name}", "arguments": '), _quote("}\n")
    return [f"call_{index}: {before} args_{index} {after}", f"args_{index}: {_value(_schema(tool), tool.strict)}"]


def _xml_call(index: int, tool: Tool) -> list[str]:
    schema = _schema(tool)
    required = schema.get("required")
    needed = set(map(str, required)) if isinstance(required, list) else set()
    names, rules = [], []
    for number, (key, value) in enumerate(properties(schema).items()):
        if not key or len(key) > MAX_NAME_CHARS or any(char.isspace() or char in '<>"' for char in key):
            problem = f"parameter {key[:60]!r}: cannot be written in the model's form of calls: rename it"
            raise InvalidRequest(f"tools: {tool.name}: {problem}")
        name, opening = f"value_{index}_{number}", f"{PARAMETER_OPEN}{key}>\n"
        names.append(name if key in needed else f"{name}?")
        rules.append(f"{name}: {_quote(opening)} {_plain(tool, key, value, schema)}")
    opening = f"\n{FUNCTION_OPEN}{tool.name}>\n"
    call = " ".join([f"call_{index}: {_quote(opening)}", *names, _quote(f"{FUNCTION_CLOSE}\n")])
    return [call, *rules]


def _plain(tool: Tool, key: str, value: object, root: Mapping[str, Any]) -> str:
    """Return the rule of one parameter, to the end of its closing tag: a string is written without quotes."""
    end, types = f"\n{PARAMETER_CLOSE}\n", json_types(value, root)
    schema = value if isinstance(value, Mapping) else {}
    if types and "string" not in types:
        shared = {name: root[name] for name in ("$defs", "definitions") if name in root}
        return f"{_value({**schema, **shared}, tool.strict)} {_quote(end)}"
    if tool.strict and (found := [word for word in _TEXT_KEYWORDS if word in schema]):
        problem = "the model's form of calls has no such rule for text: leave it out, or strict"
        raise InvalidRequest(f"tools: {tool.name}.{key}: {found[0]}: {problem}")
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(choices, list) or not choices:
        return 'text "\\n"'
    texts = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in choices]
    if any(PARAMETER_CLOSE in text for text in texts):
        raise InvalidRequest(f"tools: {tool.name}.{key}: enum: a value with {PARAMETER_CLOSE}: leave it out")
    return f"({' | '.join(map(_quote, texts))}) {_quote(end)}"


def _schema(tool: Tool) -> Mapping[str, Any]:
    """Return the schema of the arguments; names that it does not list are none, unless it says that they may be."""
    found: dict[str, Any] = json.loads(tool.parameters or "{}") or {"properties": {}}
    is_listed = "properties" in found and not _OPEN.intersection(found)
    return {"type": "object", **found, **({"additionalProperties": False} if is_listed else {})}


def _value(schema: Mapping[str, Any], strict: bool) -> str:
    """Return the rule of a JSON value; of a tool that is not strict, keywords that are not supported do not count."""
    return "%json " + json.dumps({**schema, "x-guidance": {**_SPELLING, "lenient": not strict}}, ensure_ascii=False)


def _tag(tag: str, special: Collection[str]) -> str:
    return tag if tag in special else _quote(tag)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
