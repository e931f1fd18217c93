"""Types of values of the configuration. The texts of errors are tested with the sections that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from cluster.config.section import Bytes, Count, FileName, Host, PathValue, PowerOfTwo, RayAddress, Section, optional
from protos.model.spec import SPARSE_SETTINGS


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


def test_a_section_is_strict_and_has_the_range_of_its_setting() -> None:
    class Example(Section):
        cell: int | None = optional(SPARSE_SETTINGS["cell"], "rule")
        target_recall: float | None = optional(SPARSE_SETTINGS["target_recall"], "rule")

    assert Example().as_mapping() == {}
    assert Example(cell=1 << 20, target_recall=1.0).as_mapping() == {"cell": 1 << 20, "target_recall": 1.0}
    assert Example.model_fields["cell"].description == "rule"
    for bad in ({"cell": 0}, {"cell": (1 << 20) + 1}, {"cell": "1"}, {"target_recall": 0.0}, {"cells": 1}):
        with pytest.raises(ValidationError):
            Example(**bad)
