"""Constraints as data: what the forms of vLLM become, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from protos.errors import InvalidRequest
from protos.jobs.constraint import Constraint
from protos.jobs.limits import MAX_CONSTRAINT_CHARS


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ({"json": {"type": "integer", "title": "é"}}, "json_schema", '{"type": "integer", "title": "é"}'),
        ({"json": '{"type": "integer"}'}, "json_schema", '{"type": "integer"}'),
        ({"json": True}, "json_schema", "true"),
        ({"json_object": True, "regex": None}, "json_object", ""),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["a", "b"]}, "choice", '["a", "b"]'),
        ({"choice": ("a",)}, "choice", '["a"]'),
        ({"grammar": 'start: "a"'}, "grammar", 'start: "a"'),
        (Constraint("regex", "b"), "regex", "b"),
    ],
)
def test_forms(value: Any, kind: str, text: str) -> None:
    assert Constraint.from_value(value) == Constraint(kind, text)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (5, "structured_outputs: 0 keys: must be a mapping with one of json, json_object, regex, choice, grammar"),
        ({}, "structured_outputs: 0 keys"),
        ({"json": {}, "regex": "a"}, "structured_outputs: 2 keys"),
        ({"structural_tag": "x"}, "structured_outputs.structural_tag: unknown: must be one of json,"),
        ({"json_object": False}, "structured_outputs.json_object: must be True"),
        ({"json": 5}, "structured_outputs.json: int: must be a JSON schema, an object"),
        ({"json": "{"}, "structured_outputs.json: is no JSON ("),
        ({"json": "[" * 100_000}, "structured_outputs.json: is no JSON ("),
        ({"json": {"a": object()}}, "structured_outputs.json: cannot be written as JSON ("),
        ({"json": ""}, "structured_outputs.text: must not be empty for json_schema"),
        ({"regex": 5}, "structured_outputs.regex: int: must be text"),
        ({"regex": "\ud800"}, "structured_outputs.text: has lone surrogates at 0: must be valid Unicode"),
        ({"regex": ""}, "structured_outputs.text: must not be empty for regex"),
        ({"choice": []}, "structured_outputs.choice: must be a list of at least one text"),
        ({"choice": ["a", 5]}, "structured_outputs.choice: must be a list"),
        (
            {"grammar": "a" * (MAX_CONSTRAINT_CHARS + 1)},
            "structured_outputs.text: 262145 characters: must have at most",
        ),
    ],
)
def test_refused(value: Any, problem: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Constraint.from_value(value)
    assert str(caught.value).startswith(problem)
    assert len(str(caught.value)) < 250


def test_kinds() -> None:
    with pytest.raises(InvalidRequest, match="kind: 'xml': must be one of json_schema, json_object"):
        Constraint("xml", "a")
    with pytest.raises(InvalidRequest, match="text: must be empty for json_object"):
        Constraint("json_object", "{}")
    assert Constraint("json_object").schema() == {"type": "object"}
    assert Constraint("json_schema", '{"type": "null"}').schema() == {"type": "null"}
