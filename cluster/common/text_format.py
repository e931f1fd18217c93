"""Values and errors as text of one line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

MAX_SHOWN = 60  # characters of a value or key in an error
_KEPT_IN_TEXT = "\n\t\u200c\u200d"  # Persian, Indic scripts and emoji are written with the zero-width joiners
_YAML_LITERAL = re.compile(  # unquoted text that YAML 1.1 reads as a null, boolean or number
    r"~|null|Null|NULL|yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"
    r"|[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*(:[0-5]?[0-9])*|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
    r"|[-+]?[0-9][0-9_]*(\.[0-9_]*([eE][-+][0-9]+)?|(:[0-5]?[0-9])+\.[0-9_]*)|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
)


def one_line(value: object, limit: int | None = None) -> str:
    """Return `str(value)` with each run of white space as one blank and escapes, cut to `limit` characters."""
    return escape_unprintable(" ".join(str(value).split())[:limit])


def describe_error(error: BaseException) -> str:
    """Return `TypeName: message` on one line, for errors whose message alone may say nothing."""
    return f"{type(error).__name__}: {one_line(error)}"


def escape_unprintable(text: str) -> str:
    r"""Return `text` on one line: what breaks lines, controls a terminal, turns the direction of writing or has no
    width is an escape such as `\n`.
    """
    return "".join(c if c.isprintable() else _escape(c) for c in text)


def escape_controls(text: str) -> str:
    """Return a text of several lines as a terminal may show it: like `escape_unprintable`, but line breaks, tabs,
    spaces of all kinds and joiners of letters stay.
    """
    return "".join(
        c if c.isprintable() or c in _KEPT_IN_TEXT or unicodedata.category(c) == "Zs" else _escape(c)
        for c in text.replace("\r\n", "\n")
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode()


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
    if isinstance(value, str) and (not value or value != value.strip() or _YAML_LITERAL.fullmatch(value[:MAX_SHOWN])):
        text = f'"{text}"'
    return shorten(text)
