"""What counts as growing."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cluster.bench.soak import BOUNDS, EVERY_S, draw_soak, growth, judge_growth, summarize_soak


def samples(count: int = 120, **slopes: float) -> list[dict[str, float]]:
    """A sample every 10 s; `slopes` are in units an hour, over noise and, in the first eighth, a warm-up."""
    draw = random.Random(3)
    found = []
    for number in range(count):
        at = number * EVERY_S
        row = {"at_s": at}
        for name, bound in BOUNDS.items():
            warm = min(1.0, number / (count / 8)) * bound
            row[name] = 100 + warm + slopes.get(name, 0) * at / 3600 + draw.uniform(-bound, bound) / 50
        found.append(row)
    return found


def test_what_only_warms_up_is_flat() -> None:
    assert all(found["flat"] for found in judge_growth(samples()).values())


@pytest.mark.parametrize("name", BOUNDS)
def test_what_grows_is_found(name: str) -> None:
    report = judge_growth(samples(**{name: 3.0 * BOUNDS[name]}))
    assert [entry for entry, found in report.items() if not found["flat"]] == [name]
    assert report[name]["per_hour"] == pytest.approx(3 * BOUNDS[name], rel=0.1)


def test_a_jump_that_comes_back_is_not_growth() -> None:
    points = [(at * 10.0, 5.0 + (100.0 if 30 <= at < 36 else 0.0)) for at in range(100)]
    assert growth(points)[0] == 0


def test_too_few_samples_say_nothing() -> None:
    assert growth([(0.0, 1.0), (20.0, 2.0)]) == (0.0, 0.0)


def test_a_report_is_drawn(tmp_path: Path) -> None:
    row = {"session": "a", "samples": samples(), "problems": ["x"], "facts": {"jobs": 2, "faults": ["gcs"]}}
    report = summarize_soak([row, {"session": "b", "samples": samples(5), "problems": [], "facts": {}}])
    assert (report["sessions"], len(report["samples"])) == (2, 120)
    assert (report["jobs"], report["faults"], report["problems"], report["growing"]) == (2, ["gcs"], ["x"], [])
    draw_soak(report, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")
