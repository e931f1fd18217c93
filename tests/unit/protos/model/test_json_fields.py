"""Fields of JSON objects: what is read, and that every error names file, key, value and the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protos.model.json_fields import MAX_SIZE, Fields, ModelConfigError, read_json


def fields(**values: object) -> Fields:
    return Fields("config.json", values)


@pytest.mark.parametrize("value", [1, 7, MAX_SIZE])
def test_integers(value: int) -> None:
    assert fields(size=value).integer("size") == value
    assert fields(size=None).integer("size", default=3) == fields().integer("size", default=3) == 3


def test_whole_numbers_may_be_spelled_as_floats() -> None:
    value = fields(size=1024.0).integer("size")
    assert (value, type(value)) == (1024, int)


@pytest.mark.parametrize("value", [0, MAX_SIZE + 1, 1.5, 1e300, float("inf"), "1", True, [1]])
def test_what_is_no_integer(value: object) -> None:
    with pytest.raises(ModelConfigError, match=r"^config.json: size: .*: must be a whole number from 1 to 16777216$"):
        fields(size=value).integer("size")


@pytest.mark.parametrize(
    ("bounds", "good", "bad"),
    [
        ({"above": 0.0, "at_most": 1.0}, [1e-9, 0.5, 1], [0, 1.0001, -1]),
        ({"at_least": 0.0, "at_most": 1.0}, [0, 1], [-1e-9, 2]),
        ({}, [0, -5, 1e12], [1e13, float("nan"), float("inf"), "1", True, None]),
    ],
)
def test_numbers(bounds: dict[str, Any], good: list[float], bad: list[object]) -> None:
    assert [fields(x=value).number("x", **bounds) for value in good] == good
    for value in bad:
        with pytest.raises(ModelConfigError, match=r"^config.json: x: .*must be a number"):
            fields(x=value).number("x", **bounds)
    assert fields().optional_number("x", **bounds) is None
    assert fields().number("x", default=4.0, **bounds) == 4.0


def test_booleans() -> None:
    assert fields(flag=True).boolean("flag", default=False)
    assert fields().boolean("flag", default=True)
    assert not fields(flag=None).boolean("flag", default=True)  # as programs read null
    for value in (1, "true", []):
        with pytest.raises(ModelConfigError, match=r"flag: .*: must be true or false"):
            fields(flag=value).boolean("flag", default=False)


def test_errors_are_one_short_line() -> None:
    message = str(fields().error("a\nb", "x" * 500 + "\n", "must be short"))
    assert message.isprintable()
    assert len(message) < 140


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "not valid JSON"), (b"[1]", "a JSON list: must be an object"), (b'{"a": NaN}', "NaN is not a JSON number"),
     (b"\xff", "not valid JSON"), (b"[" * 100_000, "not valid JSON")],
)  # fmt: skip
def test_files_that_are_no_objects(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelConfigError) as caught:
        read_json(tmp_path / "config.json")
    assert said in str(caught.value)
    with pytest.raises(ModelConfigError, match="cannot be read"):
        read_json(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer, not the file itself: run git"),
     (b"\n<!DOCTYPE html><html>", "a web page, not the file itself: download it again"),
     (b"GGUF\x03", "a GGUF file under another name"), (bytes(600), "begins with zeros, so its download was not")],
)  # fmt: skip
def test_what_a_file_is_instead(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelConfigError) as caught:
        read_json(tmp_path / "config.json")
    assert str(caught.value).startswith(f"{tmp_path}/config.json: {said}")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(tmp_path / "config.json").values == {}
