"""Timelines of shards."""

from __future__ import annotations

from pathlib import Path

from cluster.bench.report.files import Result
from cluster.bench.report.gantt import gantt_figure, layout_name, timelines
from tests.support.data.speed import bench_results

SCALING = Result(Path("s"), bench_results.scaling())


def test_every_shard_has_a_line_and_the_title_says_the_bubbles():
    rows = timelines([SCALING, Result(Path("d"), bench_results.decode())])
    assert [(row["stages"], row["shards"]) for _, row in rows] == [(2, 1), (4, 1), (1, 2)]
    figure = gantt_figure(*rows[2])
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["stage 0, shard 0", "stage 0, shard 1"]
    assert "64K tokens in 8 chunks over 1 stage x 2 shards" in figure.get_suptitle()
    share = rows[2][1]["bubbles"]["share"]
    assert f"{share:.1%} bubbles" in figure.get_suptitle()
    assert "take turns" in gantt_figure(*rows[1]).get_supxlabel()


def test_layouts_in_words():
    assert layout_name(2, 1) == "2 stages x 1 shard"
