from __future__ import annotations

from typing import Any

import pytest

from cluster.text.tools.schema_types import json_of_text, json_types, properties

ROOT = {"$defs": {"n": {"type": "integer"}, "a/b": {"const": True}, "loop": {"$ref": "#/$defs/loop"}}}


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}), ({"type": ["integer", "null"]}, {"integer", "null"}), ({}, set()),
        ({"enum": [1, "a", None]}, {"integer", "string", "null"}), ({"const": 1.5}, {"number"}), (True, set()),
        ({"anyOf": [{"type": "object"}, {"type": "null"}]}, {"object", "null"}), ({"$ref": "#/$defs/n"}, {"integer"}),
        ({"$ref": "#/$defs/a~1b"}, {"boolean"}), ({"$ref": "#/$defs/loop"}, set()), ({"$ref": "https://x"}, set()),
        ({"$ref": "#/$defs/none/of"}, set()), ({"type": 5}, set()), ({"enum": "a", "oneOf": 3}, set()), (None, set()),
        ({"oneOf": [{"$ref": "#/$defs/n"}, {"const": "a"}]}, {"integer", "string"}), ({"$ref": 1}, set()),
    ],
)  # fmt: skip
def test_types_of_a_schema(schema: Any, types: set[str]) -> None:
    assert json_types(schema, ROOT) == types


def test_properties_of_what_is_no_schema() -> None:
    assert properties({"properties": {"a": {}}}) == {"a": {}}
    assert properties({"properties": []}) == properties([]) == properties(None) == {}


def test_numbers_keep_their_spelling() -> None:
    assert json_of_text(" 1.50 ", frozenset({"number"})) == "1.50"
    assert json_of_text("9" * 5000, frozenset({"integer"})) == '"' + "9" * 5000 + '"'
    assert json_of_text("é", frozenset()) == '"é"'
