"""JSON schemas as they are compiled: what is not supported is refused by name, white space between tokens is bounded.

A keyword that was ignored would give answers that do not match the schema. Keywords that no draft has are ignored, as
the standard says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from protos.errors import InvalidRequest

# Between tokens of JSON: nothing, one space, or a line break with an indent. A pattern without an upper bound lets a
# model write white space until it is cut off.
WHITE_SPACE = r" |\r?\n[ \t]{0,16}"
_MAX_DEPTH = 64  # of schemas inside schemas
_SCHEMAS = ("additionalProperties", "items")  # keywords whose value is a schema
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")  # a list of them
_MAPPINGS = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_REFUSED = {  # keyword: way out
    "not": "say what is allowed instead",
    "if": "use anyOf", "then": "use anyOf", "else": "use anyOf",
    "dependentRequired": "use anyOf", "dependentSchemas": "use anyOf", "dependencies": "use anyOf",
    "uniqueItems": "leave it out and check the answer", "contains": "use prefixItems or items",
    "minContains": "use minItems", "maxContains": "use maxItems", "propertyNames": "use patternProperties",
    "unevaluatedItems": "use items", "unevaluatedProperties": "use additionalProperties",
    "additionalItems": "use prefixItems and items", "$dynamicRef": "use $ref", "$recursiveRef": "use $ref",
}  # fmt: skip
_FORMATS = ("date", "time", "date-time", "duration", "ipv4", "ipv6", "uuid", "email", "hostname", "uri")
# What has no end goes to the end of its line: else it would be tried again from every mark in it.
_LARK_PIECE = re.compile(r'"(?:\\.|[^"\\\n])*+"?|/(?:\\.|[^/\\\n])++/?|//[^\n]*+|#[^\n]*+|%json\s*+(?=\{)')


def to_compile(schema: Mapping[str, Any] | bool, where: str = "#") -> dict[str, Any]:
    """Return the schema with the settings under which llguidance compiles it. Raises InvalidRequest, see `check`."""
    check(schema, where)
    if isinstance(schema, bool):
        if not schema:
            raise InvalidRequest(f"structured_outputs.json: false at {where}: nothing can match it")
        schema = {}
    settings = {"whitespace_pattern": WHITE_SPACE, "lenient": False, "coerce_one_of": False}
    return {**schema, "x-guidance": settings}


def check(schema: Any, where: str = "#") -> None:
    """Refuse what cannot be compiled (InvalidRequest), by keyword and place."""
    left = [(schema, where, 0)]
    while left:
        one, place, depth = left.pop()
        if isinstance(one, bool):
            continue
        if not isinstance(one, Mapping):
            raise InvalidRequest(f"structured_outputs.json: {type(one).__name__} at {place}: must be a schema")
        if depth > _MAX_DEPTH:
            raise InvalidRequest(f"structured_outputs.json: {place[:200]}...: must be at most {_MAX_DEPTH} levels deep")
        for keyword, way_out in _REFUSED.items():
            if keyword in one:
                raise InvalidRequest(f"structured_outputs.json: {keyword} at {place}: is not supported: {way_out}")
        reference = one.get("$ref", "#")
        if not isinstance(reference, str) or not re.fullmatch(r"#(/.*)?", reference, re.DOTALL):
            shown = str(reference)[:100]
            raise InvalidRequest(f"structured_outputs.json: $ref {shown!r} at {place}: must begin with #/ or be #")
        if "format" in one and one["format"] not in _FORMATS:
            known = ", ".join(_FORMATS)
            shown = str(one["format"])[:60]
            raise InvalidRequest(
                f"structured_outputs.json: format {shown!r} at {place}: must be one of {known}; else use pattern"
            )
        if isinstance(one.get("items"), list):
            raise InvalidRequest(f"structured_outputs.json: items at {place}: is a list: use prefixItems")
        if "$id" in one and place != where:
            raise InvalidRequest(f"structured_outputs.json: $id at {place}: is not supported: leave it out")
        left += ((inner, f"{place}/{at}", depth + 1) for at, inner in _inner(one))


def bound_white_space(grammar: str) -> str:
    """Return a Lark grammar in whose `%json` schemas white space is bounded too.

    What such a schema says in `x-guidance` counts; without `lenient` there, it is checked. Raises InvalidRequest.
    """
    decoder, pieces, at = json.JSONDecoder(), [], 0
    while found := _LARK_PIECE.search(grammar, at):
        pieces.append(grammar[at : found.end()])
        at = found.end()
        if found.group().startswith("%json"):
            try:
                schema, at = decoder.raw_decode(grammar, at)
            except (ValueError, RecursionError) as error:
                raise InvalidRequest(f"structured_outputs.grammar: %json: is no JSON ({str(error)[:100]})") from error
            pieces.append(json.dumps(_in_grammar(schema), ensure_ascii=False))
    return "".join([*pieces, grammar[at:]])


def _in_grammar(schema: Mapping[str, Any]) -> dict[str, Any]:
    given = schema.get("x-guidance")
    settings = dict(given) if isinstance(given, Mapping) else {}
    if settings.get("lenient") is not True:
        check(schema, "%json#")
    if settings.get("whitespace_flexible") is not False:
        settings.setdefault("whitespace_pattern", WHITE_SPACE)
    return {**schema, "x-guidance": settings}


def _inner(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (place, schema) of every schema directly inside one."""
    for name in _SCHEMAS:
        if name in schema:
            yield name, schema[name]
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from ((f"{name}/{index}", one) for index, one in enumerate(schema[name]))
    for name in _MAPPINGS:
        if isinstance(schema.get(name), Mapping):
            yield from ((f"{name}/{key}", one) for key, one in schema[name].items())
