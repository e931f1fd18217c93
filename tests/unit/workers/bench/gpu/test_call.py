"""A call: children that end, die and hang, the time that is left, and what of it stands in the file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from workers.bench.gpu.call import COMPLETE, FAILED, TIME_IS_OVER, run_cases, watch
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Journal, Line, read_lines

CHILD = """
import os, sys, time
from pathlib import Path
from workers.bench.gpu.journal import Journal
journal = Journal(Path(sys.argv[1]), "x")
for name in ("one", "dies", "hangs", "last"):
    if {("s", name)} & (journal.done() | journal.failed_here()):
        continue
    journal.write("s", name, "begun", {"limit_s": 1.0 if name == "hangs" else 60})
    if name == "dies":
        os._exit(9)
    if name == "hangs":
        time.sleep(600)
    journal.write("s", name, "done")
"""


def context_of(path: Path, seconds: float = 60.0) -> Context:
    return Context(Journal(path, "x", True), torch.device("cpu"), time.monotonic() + seconds)


def test_a_child_that_dies_or_hangs_costs_one_case(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert watch(Journal(path, "x"), 5, [sys.executable, "-c", CHILD, str(path)], {}) == FAILED
    states = {line["case"]: line for line in read_lines(path)}
    assert [states[name]["state"] for name in ("one", "dies", "hangs", "last")] == ["done", "failed", "failed", "done"]
    assert states["dies"]["error"] == "the process ended with code 9"
    assert states["hangs"]["error"] == "no end in time"


def test_the_time_of_a_call_ends_a_child(tmp_path: Path) -> None:
    path, began = tmp_path / "x.jsonl", time.monotonic()
    code = "import sys, time; from pathlib import Path; from workers.bench.gpu.journal import Journal\n"
    code += "Journal(Path(sys.argv[1]), 'x').write('s', 'long', 'begun', {'limit_s': 600}); time.sleep(600)"
    assert watch(Journal(path, "x"), 0.2, [sys.executable, "-c", code, str(path)], {}) == TIME_IS_OVER
    assert time.monotonic() - began < 60
    assert read_lines(path)[-1]["error"] == "time of the call is over"
    assert watch(Journal(path, "x"), 0.01, ["false"], {}) == TIME_IS_OVER


def test_a_child_that_cannot_begin_ends_the_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    assert watch(Journal(path, "x"), 1, [sys.executable, "-c", "raise SystemExit(5)"], {}) == FAILED
    assert "ended with code 5 outside of a case" in capsys.readouterr().err


def test_cases_are_run_once_and_a_failure_costs_no_other(tmp_path: Path) -> None:
    path, ran = tmp_path / "x.jsonl", []

    def bad(context: Context) -> Line:
        raise AssertionError("wrong by 0.5")

    def parts(context: Context) -> Iterator[Line]:
        ran.append("parts")
        yield {"seconds": 1}
        yield {"seconds": 2}

    cases = [Case("s", "bad", bad), Case("s", "parts", parts), Case("s", "long", lambda _: {}, needs_s=1000)]
    assert run_cases(context_of(path), cases) == TIME_IS_OVER
    lines = read_lines(path)
    assert [(line["case"], line["state"]) for line in lines] == [
        ("bad", "begun"), ("bad", "failed"), ("parts", "begun"), ("parts", "part"), ("parts", "part"),
        ("parts", "done"),
    ]  # fmt: skip
    assert "wrong by 0.5" in lines[1]["error"]
    assert [line["seconds"] for line in lines[3:]] == [1, 2, 2]
    assert run_cases(context_of(path, 5000), cases) == COMPLETE
    assert ran == ["parts"]
    assert read_lines(path)[-1]["case"] == "long"


def test_rates_and_their_shares(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x.jsonl", "x")
    journal.write("env", "matmul", "done", {"tflops": 800.0})
    context = Context(journal, torch.device("cpu"), time.monotonic() + 60)
    found = context.rates([0.002, 0.001, 0.004], flop=8e11, moved=4e9)
    assert found == {
        "ms": 2.0, "low": 1.0, "high": 4.0, "tflops": 400.0, "of_matmul": 0.5, "gbs": 2000.0, "of_copy": None,
        "repeats": 3,
    }  # fmt: skip
    real = context.time(lambda: time.sleep(0.001), moved=1e6)
    assert real["low"] >= 1
    assert 3 <= real["repeats"] <= 20
    rehearsed = context_of(tmp_path / "y.jsonl").time(lambda: None, moved=1e6)
    assert rehearsed == {"ms": None, "low": None, "high": None, "gbs": None, "of_copy": None, "repeats": 0}
