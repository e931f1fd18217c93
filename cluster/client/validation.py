"""Checks of what callers of the client library hand over: each error names key, value and what is allowed."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.client.errors import InvalidRequest
from cluster.common.text_format import one_line

MAX_REQUEST_BYTES = 64 << 20  # as protos.channel.MAX_MESSAGE, which cannot be imported without grpc
MAX_CHARS = 256  # of a label, an idempotency key, the name of a document
MAX_LABELS = 32
MAX_STOPS = 64
MAX_ID = (1 << 32) - 1  # of a token
_SHOWN = 60  # characters of a value


def show(value: object) -> str:
    """A value in an error: one line, shortened."""
    try:
        text = repr(value) if not isinstance(value, (str, bytes)) or len(value) <= _SHOWN else repr(value[:_SHOWN])
    except ValueError:  # an integer of thousands of digits
        text = f"({type(value).__name__})"
    text = one_line(text)
    return text if len(text) <= _SHOWN + 2 else f"{text[:_SHOWN]}..."


def integer(key: str, value: object, low: int, high: int) -> int:
    """A whole number of any type, numpy's included."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise InvalidRequest(f"{key}: {show(value)}: must be a whole number from {low} to {high}")
    return number


def number(key: str, value: object, low: float, high: float, *, above: bool = False) -> float:
    """A number; `above`: greater than `low`."""
    try:
        given = float("nan") if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        given = float("nan")
    if not low <= given <= high or (above and given == low):  # NaN fails too
        allowed = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
        raise InvalidRequest(f"{key}: {show(value)}: must be a number {allowed}")
    return given


def seconds(key: str, value: object) -> float | None:
    """A time to wait: at least 0, infinite allowed; None for as long as it takes."""
    return None if value is None else number(key, value, 0.0, float("inf"))


def flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{key}: {show(value)}: must be True or False")
    return value


def text(key: str, value: object, most: int | None = None, least: int = 0) -> str:
    """Text that UTF-8 can hold, with `least` to `most` characters."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{key}: {show(value)}: must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        at = f"character {value[error.start]!a} at {error.start}"
        raise InvalidRequest(f"{key}: {at}: must be text that UTF-8 can hold") from error
    if len(value) < least or (most is not None and len(value) > most):
        allowed = f"{least} to {most}" if most is not None else f"at least {least}"
        raise InvalidRequest(f"{key}: {len(value)} characters: must have {allowed}")
    return value


def texts(key: str, values: object, most: int, least_each: int = 0) -> list[str]:
    """A list of texts; one text stands for a list of it."""
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise InvalidRequest(f"{key}: {show(values)}: must be a list of texts")
    if len(values) > most:
        raise InvalidRequest(f"{key}: {len(values)}: must be at most {most}")
    return [text(f"{key}[{index}]", value, least=least_each) for index, value in enumerate(values)]


def token_ids(key: str, values: object, most: int | None = None) -> list[int]:
    """Ids from 0; the head knows how many the model has."""
    try:
        ids = list(values)  # type: ignore[call-overload]
    except TypeError:
        raise InvalidRequest(f"{key}: {show(values)}: must be a list of whole numbers") from None
    if isinstance(values, (str, bytes)):
        raise InvalidRequest(f"{key}: {show(values)}: must be a list of whole numbers")
    if most is not None and len(ids) > most:
        raise InvalidRequest(f"{key}: {len(ids)}: must be at most {most}")
    if all(type(value) is int for value in ids) and min(ids, default=0) >= 0 and max(ids, default=0) <= MAX_ID:
        return ids  # a million of them in a few milliseconds
    return [integer(f"{key}[{index}]", value, 0, MAX_ID) for index, value in enumerate(ids)]


def labels(values: object) -> dict[str, str]:
    """Labels of a job or of a search."""
    if not isinstance(values, Mapping):
        raise InvalidRequest(f"labels: {show(values)}: must be a mapping of text to text")
    if len(values) > MAX_LABELS:
        raise InvalidRequest(f"labels: {len(values)}: must be at most {MAX_LABELS}")
    for key, value in values.items():
        text("labels", key, MAX_CHARS, least=1)
        text(f"labels.{show(key)}", value, MAX_CHARS)
    return dict(values)


def pairs(values: object) -> list[tuple[str, str]]:
    """Chat messages as (role, content)."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or not values:
        raise InvalidRequest(f"messages: {show(values)}: must be a list of at least one message")
    found = []
    for index, message in enumerate(values):
        pair: Any = message
        if isinstance(message, Mapping) and message.keys() == {"role", "content"}:
            pair = message["role"], message["content"]
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InvalidRequest(f"messages[{index}]: {show(message)}: must have role and content and nothing else")
        found.append((text(f"messages[{index}].role", pair[0]), text(f"messages[{index}].content", pair[1])))
    return found
