"""Types of values of the configuration. The texts of errors are tested with the sections that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, TypeAdapter, ValidationError

from cluster.config.section import Bytes, Count, FileName, Host, PathValue, PowerOfTwo, RayAddress, Section, rule_of


def accepts(kind: Any, value: object) -> bool:
    try:
        TypeAdapter(kind).validate_python(value, strict=True, context={"base_dir": Path("/base")})
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (PowerOfTwo, [1, 2, 1024], [3, 6, 1023, "2", 2.0]),
        (Host, ["127.0.0.1", "::1", "a", "node-1.example.org"], ["", "a b", "-a", "a-", "x" * 254, "[::1]"]),
        (RayAddress, ["local", "auto", "h:1", "[::1]:6379", "10.0.0.1:65535"],
         ["", "h", "h:0", "h:65536", ":1", "h:1x"]),
        (FileName, ["config.json", "a_b-c.1"], ["", ".", "..", "a/b", "a b", "x" * 201]),
        (Count, [5, "256K", "1_000"], [-1, 1.5, True, "5B"]),
        (Bytes, [5, "1GiB", "1.5GB"], [-1, "1XB", None]),
        (PathValue, ["x", "~/x", Path("y")], ["", "~nosuchuser/x", "a\0b", 7]),
    ],
)  # fmt: skip
def test_value_types(kind: Any, good: list[object], bad: list[object]) -> None:
    assert [value for value in good if not accepts(kind, value)] == []
    assert [value for value in bad if accepts(kind, value)] == []


def test_paths_are_relative_to_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    resolve = TypeAdapter(PathValue).validate_python
    assert resolve("a/../b", context={"base_dir": Path("/base")}) == Path("/base/b")
    assert resolve("/b", context={"base_dir": Path("/base")}) == Path("/b")
    assert resolve("~/b") == Path("/home/someone/b")
    assert resolve("b") == Path.cwd() / "b"


class Example(Section):
    described: int = Field(default=1, ge=1, description="must be odd")
    size: int = Field(default=1, ge=1)
    slots: int | None = Field(default=None, ge=0, le=9)
    share: float = Field(default=0.5, gt=0, le=1)
    scale: float | None = Field(default=None, gt=0)
    wait_s: float = Field(default=2.0, ge=0, le=60)
    mode: Literal["auto", True, False] = "auto"
    on: bool | None = None
    inner: Section = Field(default_factory=Section)


def test_a_rule_follows_from_type_and_range() -> None:
    assert {key: rule_of(key, field) for key, field in Example.model_fields.items()} == {
        "described": "must be odd",
        "size": "must be a whole number of at least 1",
        "slots": "must be a whole number from 0 to 9",
        "share": "must be a number above 0 and at most 1",
        "scale": "must be a number above 0",
        "wait_s": "must be a number of seconds from 0 to 60",
        "mode": "must be one of auto, true, false",
        "on": "must be true or false",
        "inner": "must be a mapping",
    }


def test_a_section_is_strict() -> None:
    assert Section().as_mapping() == {}
    assert Example(slots=3, mode=True).as_mapping() == {
        "described": 1, "size": 1, "slots": 3, "share": 0.5, "wait_s": 2.0, "mode": True, "inner": {},
    }  # fmt: skip
    assert "mode" not in Example().as_mapping()
    for bad in ({"size": 0}, {"slots": 10}, {"size": "1"}, {"share": 0.0}, {"sizes": 1}):
        with pytest.raises(ValidationError):
            Example(**bad)
