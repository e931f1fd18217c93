"""JSON objects whose fields are read by type."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from protos.errors import UserError
from protos.model.files import read_bounded, shown, what_it_is

MAX_SIZE = 1 << 24  # no published width, vocabulary or expert count comes near
MAX_POSITIONS = 1 << 30  # positions and token counts stay below it everywhere


class ModelConfigError(UserError):
    """A `config.json` that is malformed or describes a model this decoder does not compute."""


class Fields:
    """A JSON object whose fields are read by type; every error names the file, the key, the value and the way out."""

    def __init__(self, source: str, values: Mapping[str, object]) -> None:
        self.source = source
        self.values = values

    def error(self, key: str, value: object, requirement: str) -> ModelConfigError:
        """Return the error of a field with this value."""
        return ModelConfigError(f"{self.source}: {shown(key)}: {shown(ascii(value), 80)}: {requirement}")

    def missing(self, key: str, requirement: str) -> ModelConfigError:
        """Return the error of a field that is not there."""
        return ModelConfigError(f"{self.source}: {key}: missing: {requirement}")

    def get(self, key: str) -> object:
        """Return the value of a field, None for a missing or null one."""
        return self.values.get(key)

    def section(self, key: str, requirement: str) -> Fields:
        """Return an object inside this one, empty for a missing, null or false field."""
        value = self.get(key)
        if value is None or value is False:
            value = {}
        if not isinstance(value, dict):
            raise self.error(key, value, requirement)
        return Fields(f"{self.source}: {key}", value)

    def integer(self, key: str, *, default: int | None = None, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return a whole number in `low..high`, also spelled `7.0`; `default` stands for a missing or null field."""
        value, requirement = self.get(key), f"must be a whole number from {low} to {high}"
        if value is None:
            if default is None:
                raise self.missing(key, requirement)
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not low <= value <= high:  # type: ignore[operator]
            raise self.error(key, value, requirement)
        return int(value)  # type: ignore[call-overload, no-any-return]

    def number(
        self, key: str, *, default: float | None = None, above: float = -math.inf, at_least: float = -math.inf,
        at_most: float = 1e12,
    ) -> float:  # fmt: skip
        """Return a finite number with `above < x`, `at_least <= x` and `x <= at_most`."""
        bound = f"above {above:g}" if above > -math.inf else f"at least {at_least:g}"
        value, requirement = self.get(key), f"must be a number {bound} and at most {at_most:g}"
        if value is None:
            if default is None:
                raise self.missing(key, requirement)
            return default
        inside = isinstance(value, (int, float)) and not isinstance(value, bool) and above < value <= at_most
        if not inside or value < at_least:  # type: ignore[operator]
            raise self.error(key, value, requirement)
        return float(value)  # type: ignore[arg-type]

    def optional_number(self, key: str, **bounds: float) -> float | None:
        """Return a number as `number` does, None for a missing or null field."""
        return None if self.get(key) is None else self.number(key, **bounds)

    def boolean(self, key: str, *, default: bool) -> bool:
        """Return a boolean; `default` stands for a missing field, and null for false, as programs read it."""
        value = self.values.get(key, default)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.error(key, value, "must be true or false")
        return value


def read_json(path: Path) -> Fields:
    """Return the object in a JSON file. Raises ModelConfigError for anything else."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise ModelConfigError(f"{path}: a JSON {type(value).__name__}: must be an object")
    return Fields(str(path), value)


def read_json_value(path: Path) -> object:
    """Return what a JSON file of at most `files.MAX_JSON` bytes says. Raises ModelConfigError."""

    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    content = b""
    try:
        content = read_bounded(path)
        return json.loads(content.decode("utf-8-sig"), parse_constant=reject)
    except OSError as error:
        raise ModelConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:  # malformed JSON, not UTF-8, NaN
        words = what_it_is(content[:512]) or f"not valid JSON ({error}): download the file again"
        raise ModelConfigError(f"{path}: {words}") from error
