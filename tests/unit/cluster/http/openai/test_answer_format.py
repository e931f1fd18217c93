"""`response_format` and `structured_outputs` as constraints."""

from __future__ import annotations

import pytest

from cluster.http.core.errors import to_api_error
from cluster.http.openai.answer_format import read_constraint
from protos.jobs.constraint import Constraint

SCHEMA = {"type": "object", "properties": {"é": {"type": "integer"}}}
NAMED = {"name": "record", "strict": True, "schema": SCHEMA}
TEXT = '{"type": "object", "properties": {"é": {"type": "integer"}}}'


@pytest.mark.parametrize(("response_format", "structured_outputs", "constraint"), [
    (None, None, None), ({"type": "text"}, None, None), ("text", {}, None),
    ({"type": "json_object"}, None, Constraint("json_object")),
    ({"type": "json_schema", "json_schema": NAMED}, None, Constraint("json_schema", TEXT)),
    (None, {"json": SCHEMA}, Constraint("json_schema", TEXT)), (None, {"json": TEXT}, Constraint("json_schema", TEXT)),
    (None, {"json_object": True, "regex": None}, Constraint("json_object")),
    ({"type": "text"}, {"regex": "a+"}, Constraint("regex", "a+")),
    (None, {"choice": ["a", "b"]}, Constraint("choice", '["a", "b"]')),
    (None, {"grammar": 'start: "a"'}, Constraint("grammar", 'start: "a"')),
])  # fmt: skip
def test_constraints(response_format: object, structured_outputs: object, constraint: Constraint | None) -> None:
    assert read_constraint(response_format, structured_outputs) == constraint


@pytest.mark.parametrize(("response_format", "structured_outputs", "param"), [
    ({"type": "grammar"}, None, "response_format.type"), ({"type": [1]}, None, "response_format.type"),
    (5, None, "response_format.type"), ("json", None, "response_format.type"),
    ({"type": "json_schema"}, None, "response_format.json_schema.schema"),
    ({"type": "json_schema", "json_schema": {"name": "a"}}, None, "response_format.json_schema.schema"),
    ({"type": "json_schema", "json_schema": {"schema": "{}"}}, None, "response_format.json_schema.schema"),
    ({"type": "json_object"}, {"regex": "a"}, "structured_outputs"),
    (None, {"regex": "a", "choice": ["a"]}, "structured_outputs"), (None, [1], "structured_outputs"),
    (None, {"regexp": "a"}, "structured_outputs.regexp"), (None, {"choice": [1]}, "structured_outputs.choice"),
])  # fmt: skip
def test_refused_by_name(response_format: object, structured_outputs: object, param: str) -> None:
    with pytest.raises(Exception) as caught:
        read_constraint(response_format, structured_outputs)
    refused = to_api_error(caught.value)
    assert (refused.status, refused.param) == (400, param)
