"""The grid of cells, on documents that are plain numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from cluster.common.errors import EngineError
from cluster.engine.attention_report import AttentionSummary
from cluster.tools.display import Display
from cluster.tools.eval import grid
from cluster.tools.eval.grid import Cell, GridRun, measurements, raise_failed
from protos.errors import UserError
from tests.support.data.eval_reports import generation


class Runtime:
    """A runtime that only counts."""

    log: list[str]

    def start(self) -> None:
        self.log.append("start")

    def restart(self) -> None:
        self.log.append("restart")

    def close(self) -> None:
        self.log.append("close")


class Numbers(GridRun[int]):
    """Asks `reply` about every number."""

    def __init__(self, reply: Callable[[int], Cell], cells: list[Cell] | None = None) -> None:
        self.deployments = dict.fromkeys(("a", "b"))  # type: ignore[assignment]
        self.documents = [1, 2, 3]
        self.report = {"cells": cells or [], "complete": False}
        self.display = Display(Console(quiet=True), quiet=True)
        self._reply = reply

    def ask(self, runtime: Any, document: int) -> Cell:
        return self._reply(document)

    def place(self, document: int) -> Cell:
        return {"number": document}

    def name(self, document: int) -> str:
        return str(document)

    def summary(self, cell: Cell) -> str:
        return "done"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Runtime.log = []
    monkeypatch.setattr(grid, "ClusterRuntime", lambda *_: Runtime())
    return Runtime.log


def test_every_mode_asks_every_document(log: list[str]) -> None:
    seen: list[int] = []
    report = Numbers(lambda number: {"right": number}).run(lambda report: seen.append(len(report["cells"])))
    assert log == ["start", "close"] * 2
    assert seen == [1, 2, 3, 4, 5, 6, 6]
    assert report["complete"]
    assert report["cells"][4] == {"mode": "b", "number": 2, "right": 2}


def test_what_is_there_is_not_asked_again(log: list[str]) -> None:
    there = [{"mode": "a", "number": number, "right": 0} for number in (1, 2, 3)] + [{"mode": "b", "number": 2}]
    asked: list[int] = []

    def reply(number: int) -> Cell:
        asked.append(number)
        return {"right": 1}

    report = Numbers(reply, there).run(lambda report: None)
    assert asked == [1, 3]
    assert log == ["start", "close"]  # mode a needs no cluster
    assert len(report["cells"]) == 6


@pytest.mark.parametrize(("error", "restarts"), [(EngineError("gone"), 2), (UserError("too long"), 0)])
def test_a_failing_document_leaves_the_others(log: list[str], error: Exception, restarts: int) -> None:
    def reply(number: int) -> Cell:
        if number == 1:
            raise error
        return {"right": number}

    report = Numbers(reply).run(lambda report: None)
    assert [cell.get("error") for cell in report["cells"]] == [str(error), None, None] * 2
    assert log.count("restart") == restarts


def test_failed_answers_are_raised() -> None:
    raise_failed([generation("x")])
    with pytest.raises(EngineError, match="no room"):
        raise_failed([generation("x"), generation("", error="no room")])


def test_measurements_are_of_the_question_that_read_the_document() -> None:
    summary = AttentionSummary("sparse", "default", 1000, cells=2, density=0.25, held_out_recall=0.97)
    found = measurements(
        [generation("", 1000, 980), generation("", 1010, 10, attention=summary), generation("", 1000, 980)]
    )
    assert found["prefill_tokens_per_s"] == 500.0
    assert found["cached_tokens"] == 1970
    assert (found["attention"]["density"], found["attention"]["held_out_recall"]) == (0.25, 0.97)
    assert "layers" not in found["attention"]
    assert "attention" not in measurements([generation("", 1000, attention=AttentionSummary("dense", "default", 1000))])
