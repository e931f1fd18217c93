"""Files of a model folder: bounds before bytes, and no waiting for what is no file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protos.model.files import MAX_JSON, read_bounded, shown, what_it_is


def test_the_size_is_checked_before_a_byte_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as handle:
        handle.truncate(1 << 40)
    with pytest.raises(OSError, match=f"1099511627776 bytes: at most {MAX_JSON} are read"):
        read_bounded(path)
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes: at most 4"):
        read_bounded(path, 4)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (("pipe", "not a regular file"), (".", "Is a directory"), ("absent", "No such file")):
        with pytest.raises(OSError, match=said):
            read_bounded(tmp_path / path)
    with pytest.raises(OSError, match="not a regular file"):
        read_bounded(Path("/dev/zero"))


def test_signatures() -> None:
    assert what_it_is(b"{}") is None
    assert what_it_is(b"") is None
    assert what_it_is(b"PK\x03\x04abc") is not None
    assert what_it_is(b"  <HTML>") is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [("a" * 200, "a" * 117 + "..."), ("a\nb", r"'a\nb'"), ([1, "x"], "[1, 'x']"), ("\u2028", r"'\u2028'")],
)
def test_values_are_shown_short_and_printable(value: object, text: str) -> None:
    assert shown(value) == text
