"""Rates beside processes that compute."""

from __future__ import annotations

import contextlib

import psutil
import pytest

from cluster.bench.speed.neighbours import KINDS, Kind, measure_neighbours, neighbours


def started() -> list[psutil.Process]:
    """Return the neighbours among the children of this process, which may have others of earlier tests."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("while True" in word for word in process.cmdline()):
                found.append(process)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_they_compute_and_end(kind: Kind) -> None:
    with neighbours(2, kind):
        running = started()
        assert len(running) == 2
        assert all(sum(process.cpu_times()[:2]) > 0 for process in running)
        pinned = [len(process.cpu_affinity()) for process in running]
        assert pinned == [1, 1] or kind != "pinned"
    assert not started()


def test_they_end_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), neighbours(1, "loop"):
        raise ZeroDivisionError
    assert not started()


def test_shares_are_of_the_first_number() -> None:
    lines: list[str] = []

    def rate() -> float:
        return 100.0 / (1 + len(started()))

    rows = measure_neighbours({"served": rate, "bare": lambda: 50.0}, [0, 1], "loop", 2, lines.append)
    assert [row["neighbours"] for row in rows] == [0, 1]
    assert rows[0]["served"] == {"tokens_per_s": [100.0, 100.0], "median": 100.0, "share": 1.0}
    assert rows[1]["served"] == {"tokens_per_s": [50.0, 50.0], "median": 50.0, "share": 0.5}
    assert rows[1]["bare"]["share"] == 1.0
    assert rows[0]["fair"] == 1.0
    assert 0.5 <= rows[1]["fair"] < 1.0
    assert lines[0] == "0 neighbours, served, 1 of 2: 100 tokens/s"
