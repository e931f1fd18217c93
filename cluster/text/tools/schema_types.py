"""What the JSON schema of a tool says of its parameters, and values that a model wrote as plain text."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_NAMES |= {dict: "object", list: "array"}
_MAX_DEPTH = 16  # of references and alternatives
_MAX_PYTHON_CHARS = 1 << 16


def properties(schema: object) -> Mapping[str, Any]:
    """Return the parameters of a tool by name."""
    found = schema.get("properties") if isinstance(schema, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def json_types(schema: object, root: object) -> frozenset[str]:
    """Return the types that a schema names, in `type`, `enum`, `const`, alternatives and references; often none.

    Args:
        root: the schema of all parameters, in which references are looked up.
    """
    return frozenset(_types(schema, root, 0))


def _types(schema: object, root: object, depth: int) -> Iterator[str]:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return
    named = schema.get("type")
    if named is not None:
        yield from (name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str))
        return
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list):
        yield from (_NAMES[type(value)] for value in values if type(value) in _NAMES)
        return
    for key in ("anyOf", "oneOf", "allOf"):
        for one in schema[key] if isinstance(schema.get(key), list) else ():
            yield from _types(one, root, depth + 1)
    if isinstance(schema.get("$ref"), str):
        yield from _types(resolve(schema["$ref"], root), root, depth + 1)


def resolve(reference: str, root: object) -> object:
    """Return what a reference within a schema (`#/$defs/name`) points at; None for any other."""
    if not reference.startswith("#"):
        return None
    found = root
    for part in reference[1:].split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def json_of_text(text: str, types: frozenset[str]) -> str:
    """Return the JSON text of a value of one of `types` that is written without quotes; a string where none fits."""
    value = text.strip()
    for name in ("null", "boolean", "integer", "number", "object", "array"):
        if name in types and (found := _typed(value, name)) is not None:
            return found
    return json.dumps(text, ensure_ascii=False)


def _typed(value: str, name: str) -> str | None:
    """Return the JSON text of a value if it has this type; JSON stays as it is written."""
    lower = value.lower()
    if name == "null":
        return "null" if lower in ("null", "none") else None
    if name == "boolean":
        return lower if lower in ("true", "false") else None
    try:
        found = json.loads(value, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _python_text(value, name) if name in ("object", "array") else None
    kind = _NAMES[type(found)]
    return value if kind == name or (kind, name) == ("integer", "number") else None


def _python_text(value: str, name: str) -> str | None:
    """Return the JSON text of a Python literal, which models also write."""
    if len(value) > _MAX_PYTHON_CHARS:
        return None
    try:
        found = ast.literal_eval(value)
        if _NAMES.get(type(found)) != name:
            return None
        return json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant}: no JSON")
