"""Checks of requests to the job service. An error (InvalidRequest) names key, value and what is allowed.

Clients check what callers hand over value by value and then the whole message, the head checks the message again. The
input itself (text, token ids, chat) is judged by the head alone, which knows the model.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from protos.jobs.constraint import Constraint
from protos.jobs.convert import read_message
from protos.jobs.limits import (
    MAX_CHARS,
    MAX_DEADLINE_S,
    MAX_LABELS,
    MAX_MESSAGES,
    MAX_QUESTIONS,
    MAX_STOPS,
    MAX_TOKEN_IDS,
    MAX_UINT32,
)
from protos.jobs.logit_bias import TokenBias, read_logit_bias
from protos.jobs.sampling import OPTIONS, AnswerOptions

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SHOWN = 60  # characters of a value in an error


def check_submit(request: pb.SubmitRequest) -> AnswerOptions:
    """Return the options of a submission that keeps the limits. Raises InvalidRequest."""
    options = read_options(request.sampling)
    if request.HasField("deadline_s"):
        check_number("deadline_s", request.deadline_s, 0.0, MAX_DEADLINE_S, above=True, unit=" of seconds")
    check_text("idempotency_key", request.idempotency_key, MAX_CHARS)
    check_labels(request.labels)
    check_count("document.questions", len(request.document.questions), MAX_QUESTIONS)
    check_count("token_ids", len(request.token_ids.ids), MAX_TOKEN_IDS)
    check_count("chat.messages", len(request.chat.messages), MAX_MESSAGES)
    return options


def check_header(header: pb.DocumentHeader) -> pb.DocumentHeader:
    """Return the header of an upload that keeps the limits. Raises InvalidRequest."""
    check_text("name", header.name, MAX_CHARS)
    if header.source_hash and not _SHA256.fullmatch(header.source_hash):
        raise InvalidRequest(f"source_hash: {show(header.source_hash)}: must be 64 hexadecimal digits, or empty")
    return header


def read_options(sampling: pb.Sampling) -> AnswerOptions:
    """Return the options in a message; what is absent keeps its default. Raises InvalidRequest."""
    check_count("stop", len(sampling.stop), MAX_STOPS)
    check_count("stop_token_ids", len(sampling.stop_token_ids), MAX_STOPS)
    for stop in sampling.stop:
        check_text("stop", stop, MAX_CHARS, min_chars=1)
    present = {item.name: value for item, value in sampling.ListFields()}
    values: dict[str, Any] = {name: tuple(value) if OPTIONS[name].is_list else value for name, value in present.items()}
    if "structured_outputs" in values:
        values["structured_outputs"] = read_message(Constraint, sampling.structured_outputs)
    if "logit_bias" in values:
        values["logit_bias"] = read_logit_bias([(one.token_id, one.bias) for one in sampling.logit_bias])
    return AnswerOptions.from_values(values)


def check_option(name: str, value: object) -> Any:
    """Return a generation option as the type it is declared with. Raises InvalidRequest."""
    option = OPTIONS[name]
    if option.kind is TokenBias:
        return read_logit_bias(value or ())
    if option.is_list:
        values = value or ()
        return check_texts(name, values, min_chars=1) if option.kind is str else check_token_ids(name, values)
    if option.kind is bool:
        return check_flag(name, value)
    if option.kind is Constraint:
        return Constraint.from_value(value)
    if option.kind is int:
        return check_integer(name, value, int(option.low), MAX_UINT32 if option.high == math.inf else int(option.high))
    return check_number(name, value, option.low, option.high)


def show(value: object) -> str:
    """Return a value as an error shows it: on one line, shortened."""
    is_long = isinstance(value, (str, bytes)) and len(value) > _MAX_SHOWN
    try:
        shown = repr(value[:_MAX_SHOWN] if is_long else value)  # type: ignore[index]
    except ValueError:  # an integer of thousands of digits
        shown = f"({type(value).__name__})"
    shown = " ".join(shown.split())
    return shown if len(shown) <= _MAX_SHOWN + 2 else f"{shown[:_MAX_SHOWN]}..."


def check_count(key: str, count: int, limit: int) -> None:
    """Refuse more than `limit` elements."""
    if count > limit:
        raise InvalidRequest(f"{key}: {count}: must be at most {limit}")


def check_integer(key: str, value: object, low: int, high: int) -> int:
    """Return a whole number of any type, numpy's included, as an `int`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or not low <= number <= high:
        raise InvalidRequest(f"{key}: {show(value)}: must be a whole number from {low} to {high}")
    return number


def check_number(key: str, value: object, low: float, high: float, *, above: bool = False, unit: str = "") -> float:
    """Return a number as a `float`; `above`: greater than `low`; `unit` follows the word in the error."""
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (above and number == low):  # NaN fails too
        top = f"{high:.0f}" if unit else f"{high:g}"
        allowed = f"above {low:g} and at most {top}" if above else f"from {low:g} to {top}"
        raise InvalidRequest(f"{key}: {show(value)}: must be a number{unit} {allowed}")
    return number


def check_flag(key: str, value: object) -> bool:
    """Return True or False; numbers are neither."""
    if not isinstance(value, bool):
        raise InvalidRequest(f"{key}: {show(value)}: must be True or False")
    return value


def check_text(key: str, value: object, max_chars: int | None = None, min_chars: int = 0) -> str:
    """Return a text of `min_chars` to `max_chars` characters that UTF-8 can hold."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{key}: {show(value)}: must be text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        at = f"character {value[error.start]!a} at {error.start}"
        raise InvalidRequest(f"{key}: {at}: must be text that UTF-8 can hold") from error
    if len(value) < min_chars or (max_chars is not None and len(value) > max_chars):
        allowed = f"{min_chars} to {max_chars} characters" if max_chars is not None else f"at least {min_chars}"
        raise InvalidRequest(f"{key}: {len(value)} characters: must have {allowed}")
    return value


def check_texts(key: str, values: object, min_chars: int = 0) -> list[str]:
    """Return a list of texts; one text stands for a list of it."""
    if isinstance(values, str):
        values = [values]
    if not isinstance(values, Sequence) or isinstance(values, bytes):
        raise InvalidRequest(f"{key}: {show(values)}: must be a list of texts")
    return [check_text(f"{key}[{index}]", value, min_chars=min_chars) for index, value in enumerate(values)]


def check_token_ids(key: str, values: object) -> list[int]:
    """Return ids from 0; the head knows how many the model has."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise InvalidRequest(f"{key}: {show(values)}: must be a list of whole numbers")
    ids = list(values)
    if all(type(value) is int for value in ids) and min(ids, default=0) >= 0 and max(ids, default=0) <= MAX_UINT32:
        return ids  # a million of them in a few milliseconds
    return [check_integer(f"{key}[{index}]", value, 0, MAX_UINT32) for index, value in enumerate(ids)]


def check_labels(values: object) -> dict[str, str]:
    """Return labels, of a job or of a search for some."""
    if not isinstance(values, Mapping):
        raise InvalidRequest(f"labels: {show(values)}: must be a mapping of text to text")
    check_count("labels", len(values), MAX_LABELS)
    for key, value in values.items():
        check_text("labels", key, MAX_CHARS, min_chars=1)
        check_text(f"labels.{show(key)}", value, MAX_CHARS)
    return dict(values)
