"""Values and errors on one line."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.common.text_format import (
    MAX_SHOWN,
    describe_error,
    escape_controls,
    escape_unprintable,
    one_line,
    shorten,
    show_value,
)


def test_one_line() -> None:
    assert one_line(ValueError("  two\n\tlines ")) == "two lines"
    assert one_line("a b", 2) == "a "
    assert one_line(ValueError()) == ""


def test_describe_error_names_the_type() -> None:
    assert describe_error(KeyError("no\nkey")) == "KeyError: 'no\\nkey'"
    assert describe_error(AssertionError()) == "AssertionError: "


def test_escape_unprintable() -> None:
    assert escape_unprintable("a\nb\x1b[31m\u2028ü") == r"a\nb\x1b[31m\u2028ü"


def test_one_line_escapes() -> None:
    assert one_line("a\x1b[31m \u202e\u200b\x9b\x7f\r\n b") == r"a\x1b[31m \u202e\u200b\x9b\x7f b"


def test_escape_controls_keeps_text() -> None:
    text = "a\tb\n\xa0\u202f\u3000 \u0645\u06cc\u200c\u062e \U0001f469\u200d\U0001f52c ü\n"
    assert escape_controls(text) == text
    assert escape_controls("a\r\nb") == "a\nb"


@given(st.text())
def test_escape_controls_leaves_no_control(text: str) -> None:
    shown = escape_controls(text)
    kinds = {unicodedata.category(char) for char in shown if char not in "\n\t\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@pytest.mark.parametrize("length", [0, 1, MAX_SHOWN - 1, MAX_SHOWN, MAX_SHOWN + 1, 1000])
def test_shorten(length: int) -> None:
    text = "x" * length
    assert shorten(text) == (text if length <= MAX_SHOWN else "x" * (MAX_SHOWN - 3) + "...")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "null"), (True, "true"), (False, "false"), (12, "12"), (1.5, "1.5"), ("plain", "plain"),
        ("", '""'), (" x", '" x"'), ("12", '"12"'), ("yes", '"yes"'), ("~", '"~"'), ("1.5", '"1.5"'),
        ({"a": 1}, "(a mapping of 1)"), ([1, 2], "(a list of 2)"), ((), "(a list of 0)"),
        (1 << 300, "(an integer of 301 bits)"), (b"x", "(bytes)"), ("a\nb", r"a\nb"),
        ("x" * 100, "x" * 57 + "..."),
    ],
)  # fmt: skip
def test_show_value(value: object, shown: str) -> None:
    assert show_value(value) == shown


@given(st.text() | st.integers() | st.floats() | st.binary())
def test_any_value_is_shown_on_one_short_line(value: object) -> None:
    shown = show_value(value)
    assert shown.isprintable()
    assert 0 < len(shown) <= MAX_SHOWN
