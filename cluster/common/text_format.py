"""Values and errors as text of one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_SHOWN = 60  # characters of a value or key in an error


def one_line(value: object, limit: int | None = None) -> str:
    """Return `str(value)` with each run of white space as one blank, cut to `limit` characters."""
    return " ".join(str(value).split())[:limit]


def describe_error(error: BaseException) -> str:
    """Return `TypeName: message` on one line, for errors whose message alone may say nothing."""
    return f"{type(error).__name__}: {one_line(error)}"


def tls_reason(error: Exception) -> str:
    """Return what OpenSSL says is wrong, in plain words: `KEY_VALUES_MISMATCH` as `key values mismatch`."""
    return (getattr(error, "reason", None) or str(error) or type(error).__name__).replace("_", " ").lower()


def escape_unprintable(text: str) -> str:
    r"""Return `text` with line breaks and other unprintable characters as escapes such as `\n`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str) -> str:
    """Return `text`, cut to `MAX_SHOWN` characters with `...` at its end if it is longer."""
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def show_value(value: object) -> str:
    """Return a value as an error shows it: one line, at most `MAX_SHOWN` characters, number-like text in quotes."""
    if isinstance(value, Mapping):
        return f"(a mapping of {len(value)})"
    if isinstance(value, (list, tuple)):
        return f"(a list of {len(value)})"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 200:  # str() of a huge integer is slow or refused
        return f"(an integer of {value.bit_length()} bits)"
    if not isinstance(value, (str, int, float)):
        return f"({type(value).__name__})"
    text = escape_unprintable(str(value)[: 2 * MAX_SHOWN])
    if isinstance(value, str) and (not value or value != value.strip() or _is_yaml_literal(value)):
        text = f'"{text}"'
    return shorten(text)


def _is_yaml_literal(text: str) -> bool:
    """Whether YAML would read the unquoted text as a number, boolean or null."""
    import yaml  # here: the client library uses this module, and needs no YAML

    loader: Any = yaml.SafeLoader("")
    tag: str = loader.resolve(yaml.ScalarNode, text[:MAX_SHOWN], (True, False))
    return tag.rpartition(":")[2] in ("int", "float", "bool", "null")
