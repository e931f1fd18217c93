"""What the text of an answer must match: a constraint as data, as requests, jobs and the command line carry it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from protos.errors import InvalidRequest
from protos.jobs.limits import MAX_CONSTRAINT_CHARS

KINDS = ("json_schema", "json_object", "regex", "choice", "grammar")
_NAMES = {"json": "json_schema", "json_object": "json_object"} | {kind: kind for kind in KINDS[2:]}
_KEY = "structured_outputs"


@dataclass(frozen=True, slots=True)
class Constraint:
    """The text of an answer, all of it, must match this.

    `kind` is one of `KINDS`; `text` is the JSON schema, the regular expression (Rust syntax), a JSON list of texts, or
    the grammar (Lark, as llguidance reads it), and empty for `json_object`: any JSON object. Whether the head can
    compile it, the head says.

    Raises:
        InvalidRequest: an unknown kind, or a text that is missing, too long, or not of that kind.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequest(f"{_KEY}.kind: {self.kind[:60]!r}: must be one of {', '.join(KINDS)}")
        if not self.text.isascii():
            _check_unicode(self.text)
        if len(self.text) > MAX_CONSTRAINT_CHARS:
            size = f"{len(self.text)} characters: must have at most {MAX_CONSTRAINT_CHARS}"
            raise InvalidRequest(f"{_KEY}.text: {size}")
        if bool(self.text) is (self.kind == "json_object"):
            raise InvalidRequest(f"{_KEY}.text: must {'be empty' if self.text else 'not be empty'} for {self.kind}")
        if self.kind == "choice":
            self.choices()
        elif self.kind == "json_schema":
            self.schema()

    @classmethod
    def from_value(cls, value: object) -> Constraint:
        """Return the constraint of a mapping with one key, as vLLM has it, or `value` if it is one already.

        That is `json` (a schema, or its text), `json_object` (True), `regex`, `choice` (a list of texts) or `grammar`.
        """
        if isinstance(value, Constraint):
            return value
        said = {name: item for name, item in value.items() if item is not None} if isinstance(value, Mapping) else {}
        unknown = sorted(str(name) for name in said if name not in _NAMES)
        if unknown:
            raise InvalidRequest(f"{_KEY}.{unknown[0][:60]}: unknown: must be one of {', '.join(_NAMES)}")
        if len(said) != 1:
            raise InvalidRequest(f"{_KEY}: {len(said)} keys: must be a mapping with one of {', '.join(_NAMES)}")
        name, item = next(iter(said.items()))
        if name == "json_object":
            if item is not True:
                raise InvalidRequest(f"{_KEY}.json_object: must be True")
            return cls("json_object")
        if name in ("json", "choice") and not isinstance(item, str):
            item = _dump(name, item)
        if not isinstance(item, str):
            raise InvalidRequest(f"{_KEY}.{name}: {type(item).__name__}: must be text")
        return cls(_NAMES[name], item)

    def choices(self) -> list[str]:
        """Return the texts of a choice."""
        values = _load("choice", self.text)
        if not isinstance(values, list) or not values or not all(isinstance(one, str) for one in values):
            raise InvalidRequest(f"{_KEY}.choice: must be a list of at least one text")
        return values

    def schema(self) -> dict[str, Any] | bool:
        """Return the JSON schema, of any object for `json_object`."""
        if self.kind == "json_object":
            return {"type": "object"}
        value = _load("json", self.text)
        if not isinstance(value, (dict, bool)):
            raise InvalidRequest(f"{_KEY}.json: {type(value).__name__}: must be a JSON schema, an object")
        return value


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{_KEY}.text: has lone surrogates at {error.start}: must be valid Unicode") from error


def _load(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{_KEY}.{name}: is no JSON ({str(error)[:100]})") from error


def _dump(name: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{_KEY}.{name}: cannot be written as JSON ({str(error)[:100]})") from error
