"""Rates beside processes that compute."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from cluster.bench.__main__ import main
from cluster.bench.speed.neighbours import KINDS, Kind, Neighbour, measure_neighbours, neighbours
from tests.support.fakes.stage import eventually


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
    with neighbours(2, Neighbour(kind)):
        running = started()
        assert len(running) == 2
        assert all(sum(process.cpu_times()[:2]) > 0 for process in running)
        pinned = [len(process.cpu_affinity()) for process in running]
        assert pinned == [1, 1] or kind != "pinned"
    assert not started()


def test_they_end_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), neighbours(1, Neighbour()):
        raise ZeroDivisionError
    assert not started()


def test_shares_are_of_the_first_number() -> None:
    lines: list[str] = []

    def rate() -> float:
        return 100.0 / (1 + len(started()))

    rows = measure_neighbours({"served": rate, "bare": lambda: 50.0}, [0, 1], Neighbour(), 2, lines.append)
    assert [row["neighbours"] for row in rows] == [0, 1]
    assert rows[0]["served"] == {"tokens_per_s": [100.0, 100.0], "median": 100.0, "share": 1.0}
    assert rows[1]["served"] == {"tokens_per_s": [50.0, 50.0], "median": 50.0, "share": 0.5}
    assert rows[1]["bare"]["share"] == 1.0
    assert rows[0]["fair"] == 1.0
    assert 0.5 <= rows[1]["fair"] < 1.0
    assert lines[0] == "0 neighbours, served, 1 of 2: 100 tokens/s"


def test_a_command_ends_with_its_children(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text("import subprocess\nsubprocess.run(['sleep', '600'])  # while True")
    with neighbours(1, Neighbour(command=f"{sys.executable} {script}  'while True'", settle_s=0.5)):
        (server,) = started()
        eventually(lambda: bool(server.children()))
        (child,) = server.children()
    assert not started()
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "nobody may have waited for it yet"


def test_a_command_that_ends_is_an_error() -> None:
    with (
        pytest.raises(RuntimeError, match="true ended by itself"),
        neighbours(1, Neighbour(command="true", settle_s=0.2)),
    ):
        pass


@pytest.mark.parametrize("command", ["no-such-program --port 1", "'unclosed", ""])
def test_a_command_that_is_no_program_is_refused_before_anything_starts(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(main, ["neighbours", "--model", str(tmp_path), "--command", command])
    assert result.exit_code == 2
    assert "Invalid value for '--command'" in result.output
