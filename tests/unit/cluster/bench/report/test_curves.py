"""Curves show the points of their rows, and none where rows are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.report.curves import collect, decode_figure, efficiency_figure, first_token_figure, throughput_figure
from cluster.bench.report.files import Result
from tests.support.data.speed import bench_results

PREFILL = Result(Path("p"), bench_results.prefill())
DECODE = Result(Path("d"), bench_results.decode())
SCALING = Result(Path("s"), bench_results.scaling())
COMPARE = Result(Path("c"), bench_results.compare())


def names(figure: object) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # type: ignore[attr-defined]


def test_first_tokens_of_modes_and_engines():
    figure = first_token_figure([PREFILL, COMPARE])
    assert names(figure) == ["longreach, dense", "longreach, sparse", "transformers"]
    assert names(first_token_figure([PREFILL])) == ["dense", "sparse"]
    axis = figure.axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert "seconds" in axis.get_ylabel()
    assert "hollow" in figure.get_supxlabel()  # a row of sparse was disturbed
    assert "hollow" not in first_token_figure([COMPARE]).get_supxlabel()
    assert first_token_figure([DECODE]) is None


def test_points_are_in_order_with_their_ranges():
    rows = [("a", 4.0, bench_results.row("s", 2.0)), ("b", 1.0, {"figures": {}}), ("a", 1.0, bench_results.row("s", 1))]
    (series,) = collect(rows, "s")
    assert series.name == "a"
    assert series.points == [(4.0, 2.0, 1.94, 2.1), (1.0, 1.0, 0.97, 1.05)]


def test_decode_begins_at_zero():
    figure = decode_figure([DECODE])
    assert names(figure) == ["bfloat16", "int8 KV"]
    assert figure.axes[0].get_ylim()[0] == 0.0
    assert decode_figure([PREFILL]) is None


def test_efficiency_of_stages_and_shards():
    figure = efficiency_figure([SCALING])
    assert names(figure) == ["stages, strong", "shards, strong", "stages, weak"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(texts) == ["45%", "90%", "95%", "96%"]
    assert "take turns" in figure.get_supxlabel()
    assert efficiency_figure([PREFILL]) is None


def test_curves_name_the_mode_where_there_are_several():
    report = bench_results.scaling()
    for row in report["rows"]:
        row["mode"] = "sparse" if row["kind"] == "strong" else row["mode"]
    figure = efficiency_figure([Result(Path("s"), report)])
    assert names(figure) == ["stages, strong, sparse", "shards, strong, sparse", "stages, weak, dense"]


def test_throughput_of_layouts():
    report = bench_results.scaling()
    more = [row | {"stages": 2} for row in report["rows"] if row["kind"] == "throughput"]
    figure = throughput_figure([Result(Path("s"), report | {"rows": report["rows"] + more}), PREFILL])
    assert names(figure) == ["1 x 1", "2 x 1"]
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "4"]
    assert list(axis.get_lines()[0].get_ydata()) == [1100.0, 1300.0, 1700.0]
    assert figure.get_suptitle() == "Throughput of jobs: 4K in, 64 out (tokens)"
    assert axis.get_ylim()[0] == 0.0
    strong = [row for row in report["rows"] if row["kind"] != "throughput"]
    assert throughput_figure([Result(Path("s"), report | {"rows": strong})]) is None


@pytest.mark.parametrize("draw", [first_token_figure, decode_figure, efficiency_figure, throughput_figure])
def test_nothing_is_drawn_of_nothing(draw):
    assert draw([]) is None
