"""The table of tasks, lengths and modes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.tools.eval.ruler.tables import average, cost_of_sparse, result, ruler_table, scores_of
from cluster.tools.eval.tables import print_report
from tests.support.data.eval_reports import ruler_report


def lines(report: dict[str, object]) -> list[list[str]]:
    out = io.StringIO()
    Console(file=out, width=100).print(ruler_table(report))
    return [line.split() for line in out.getvalue().splitlines()]


def test_a_line_a_task_and_length_and_their_average() -> None:
    found = lines(ruler_report([4096, 16384]))
    assert found[0] == ["task", "tokens", "plain", "yarn", "dca", "sparse"]
    assert found[1] == ["vt", "4K", *["100", "(51-100)"] * 3, "75", "(30-95)"]
    assert found[2][:3] == ["vt", "16K", "0"]
    assert [line[0] for line in found[3:]] == ["cwe", "cwe", "average", "average"]
    assert found[6] == ["average", "16K", "0.0", "±21.2", "100.0", "±21.2", "100.0", "±21.2", "75.0", "±23.7"]
    assert len(lines(ruler_report([4096], ("vt",)))) == 2  # one task needs no average


def test_missing_and_failed_cells() -> None:
    report = ruler_report([4096])
    report["cells"][0] = {"mode": "plain", "task": "vt", "length": 4096, "error": "gone [x]\n"}
    del report["cells"][3]
    found = lines(report)
    assert found[1][:3] == ["vt", "4K", "failed"]
    assert average(report, "plain", 4096) is None
    assert average(report, "dca", 4096) == pytest.approx((1.0, 0.2122), abs=1e-4)
    assert list(scores_of(report, "yarn", 4096)) == ["vt"]
    out = io.StringIO()
    print_report(report | {"complete": False}, Console(file=out, width=100))
    assert "failed: plain vt 4K: gone [x]" in out.getvalue()
    assert "not finished" in out.getvalue()


def test_what_sparse_costs() -> None:
    report = ruler_report([4096, 16384])
    first, second = cost_of_sparse(report)
    assert first == "sparse less dca at 4K: -25.0 ±34.6 points"
    assert second.startswith("sparse less dca at 16K")
    assert cost_of_sparse(ruler_report([4096], modes=("plain", "dca"))) == []
    assert scores_of(report, "sparse", 4096)["vt"] == pytest.approx([0.0, 1.0, 1.0, 1.0])


def shared_report() -> dict[str, Any]:
    """Two tasks in each of two haystacks, two questions a task: the second haystack was read first."""
    report = ruler_report([4096], ("vt", "cwe"), ("dca",)) | {"questions": 2, "note": "questions: 2 a haystack; x"}
    found = {
        1: [("vt", 0.0), ("vt", 1.0), ("cwe", 0.5), ("cwe", 0.5)],
        0: [("vt", 1.0), ("vt", 1.0), ("cwe", 1.0), ("cwe", 0.0)],
    }
    report["cells"] = [
        {"mode": "dca", "task": "vt+cwe", "length": 4096, "haystack": at, "outcomes": [
            {"task": task, "score": score} for task, score in outcomes]}
        for at, outcomes in found.items()
    ]  # fmt: skip
    return report


def test_haystacks_of_several_tasks_are_taken_apart() -> None:
    report = shared_report()
    assert scores_of(report, "dca", 4096) == {"vt": [1.0, 1.0, 0.0, 1.0], "cwe": [1.0, 0.0, 0.5, 0.5]}
    assert result(report, "dca", 4096, "vt") == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)
    assert [line[:3] for line in lines(report)[1:]] == [
        ["vt", "4K", "75"], ["cwe", "4K", "50"], ["average", "4K", "62.5"],
    ]  # fmt: skip
    out = io.StringIO()
    print_report(report, Console(file=out, width=120))
    assert "4 samples a task and length (questions: 2 a haystack; x), score in percent" in out.getvalue()


def test_missing_and_failed_haystacks() -> None:
    report = shared_report()
    report["cells"][0] = {"mode": "dca", "task": "vt+cwe", "length": 4096, "haystack": 1, "error": "gone"}
    assert lines(report)[1] == ["vt", "4K", "100", "(34-100)", "of", "2"]
    assert average(report, "dca", 4096) is None
    report["cells"].pop()
    assert lines(report)[2] == ["cwe", "4K", "failed"]
