"""Rows of the check: errors, verdict, and what a resumed run does not repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.planning import check
from cluster.bench.planning.check import SHAPES, Amount, Shape, check_plan


def row_of(shape: Shape, memory: float = 0.01, prefill: float = 0.1, decode: float = -0.1) -> dict[str, Any]:
    errors = {"memory": memory, "prefill_s": prefill, "decode_s": decode}
    return {"shape": {"name": shape.name}, "disturbed": False, "other_load_cores": 0.0} | {
        name: {"predicted": 1 + error, "measured": 1.0, "error": error} for name, error in errors.items()
    }


@pytest.mark.parametrize(
    ("change", "met"),
    [({}, True), ({"memory": -0.06}, False), ({"prefill": 0.21}, False), ({"decode": -0.25}, False)],
)
def test_the_worst_row_decides(monkeypatch: pytest.MonkeyPatch, change: dict[str, float], met: bool):
    measured = iter([{}, {}, change, {}, {}])
    monkeypatch.setattr(check, "_check_shape", lambda model, shape, *_: row_of(shape, **next(measured)))
    result = check_plan(Path("m"), Amount(1024, 256, 8), None, lambda line: None)
    assert result["met"] is met
    assert len(result["rows"]) == len(SHAPES) == 5
    for name, value in change.items():
        assert result["largest_errors"][name] == abs(value)


def test_shapes_that_are_there_are_not_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[str] = []

    def measure(model: Path, shape: Shape, *_: object) -> dict[str, Any]:
        asked.append(shape.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return row_of(shape)

    monkeypatch.setattr(check, "_check_shape", measure)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(KeyboardInterrupt):
        check_plan(Path("m"), Amount(1024, 256, 8), path, lambda line: None)
    assert len(path.read_text().splitlines()) == 3, "what run it is, and two rows"
    check_plan(Path("m"), Amount(1024, 256, 8), path, lambda line: None)
    assert asked == [shape.name for shape in (*SHAPES[:3], *SHAPES[2:])]
    assert json.loads(path.read_text().splitlines()[-1])["shape"]["name"] == SHAPES[-1].name


def test_errors_are_relative_to_what_was_measured():
    assert check._compare(110.0, 100.0) == {"predicted": 110.0, "measured": 100.0, "error": 0.1}
    several = {"predicted": 110.0, "measured": 100.0, "error": 0.1, "repeats": (140.0, 100.0, 90.0)}
    assert check._compare(110.0, 140.0, 100.0, 90.0) == several
    assert "others kept 1.5 cores busy" in check._summary(
        row_of(SHAPES[0]) | {"disturbed": True, "other_load_cores": 1.5}
    )
