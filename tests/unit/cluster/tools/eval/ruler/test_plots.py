"""Pictures of scores over length."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.tools.eval.plots import draw
from cluster.tools.eval.ruler.plots import draw_scores
from cluster.tools.eval.ruler.tasks import TASKS
from tests.support.data.eval_reports import ruler_report


def test_a_panel_a_task_and_one_for_the_average(tmp_path: Path) -> None:
    figure = draw_scores(ruler_report([4096, 16384, 65536], tuple(TASKS)))
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == [*TASKS, "average"]
    labels = [container.get_label() for container in shown[0].containers]
    assert labels == ["plain", "yarn", "dca", "sparse"]
    draw(ruler_report([4096]), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_lines_have_the_scores_and_their_intervals() -> None:
    figure = draw_scores(ruler_report([4096, 16384], ("vt",), ("plain",)))
    (axis,) = figure.axes
    line, _, (bars,) = axis.containers[0]
    assert list(line.get_ydata()) == [100.0, 0.0]
    assert [list(segment[:, 1]) for segment in bars.get_segments()] == [
        pytest.approx([51.01, 100.0], abs=0.01), pytest.approx([0.0, 48.99], abs=0.01),
    ]  # fmt: skip
    assert [label.get_text() for label in axis.get_xticklabels()] == ["4K", "16K"]


def test_missing_results_leave_gaps() -> None:
    report = ruler_report([4096, 16384])
    report["cells"] = [cell for cell in report["cells"] if cell["mode"] == "dca" and cell["length"] == 4096]
    figure = draw_scores(report)
    counts = [len(container[0].get_ydata()) for container in figure.axes[0].containers]
    assert counts == [0, 0, 1, 0]


def test_notes_are_above_the_legend() -> None:
    figure = draw_scores(ruler_report([4096]) | {"notes": ["yarn: factor 4 at 4K; 16 at 64K", "x"], "note": "n " * 80})
    assert figure.legends[0].get_title().get_text() == "yarn: factor 4 at 4K; 16 at 64K\nx"
    assert len(figure.get_suptitle().splitlines()) > 1
    assert draw_scores(ruler_report([4096])).legends[0].get_title().get_text() == ""
