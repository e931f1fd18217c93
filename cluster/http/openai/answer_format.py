"""What the text of an answer must match, as chat completions say it: `response_format` and `structured_outputs`."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.http.core.errors import refuse
from protos.jobs.constraint import Constraint
from protos.jobs.validate import show


def read_constraint(response_format: object, structured_outputs: object) -> Constraint | None:
    """Return the constraint of a request; None where any text will do.

    Args:
        response_format: `{"type": "text"}`, `json_object` or `json_schema`, as OpenAI has it.
        structured_outputs: a mapping with one key, as vLLM has it, see `Constraint.from_value`.

    Raises:
        ApiError: another format, one without a schema, or both fields. InvalidRequest: see `Constraint`.
    """
    values = response_format if isinstance(response_format, Mapping) else {"type": response_format}
    kind = values.get("type")
    if kind is None or kind == "text":
        return Constraint.from_value(structured_outputs) if structured_outputs else None
    if structured_outputs:
        raise refuse("structured_outputs", "is beside response_format: leave one of them out")
    if kind == "json_object":
        return Constraint("json_object")
    if kind != "json_schema":
        raise refuse("response_format.type", f"{show(kind)}: must be text, json_object or json_schema")
    described = values.get("json_schema")
    schema = described.get("schema") if isinstance(described, Mapping) else None
    if not isinstance(schema, Mapping):
        raise refuse("response_format.json_schema.schema", f"{show(schema)}: must be a JSON schema, an object")
    return Constraint.from_value({"json": schema})
