"""Fitted against measured chunks, recall against density."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.report.files import Result
from cluster.bench.report.scatter import fit_figure, recall_figure
from tests.support.data.speed import bench_results


def names(figure: object) -> list[str]:
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # type: ignore[attr-defined]


def test_the_fit_says_how_far_off_it_is():
    report = bench_results.prefill()
    for row in report["rows"]:
        row["chunks"] = [{"measured_s": 1.0, "fitted_s": part} for part in (1.1, 0.9, 1.0, 1.3, 0.0)]
    figure = fit_figure([Result(Path("p"), report)])
    assert names(figure) == ["within 20%", "dense: off by 10.0% (median of 16)", "sparse: off by 10.0% (median of 16)"]
    axis = figure.axes[0]
    assert axis.get_xlim() == axis.get_ylim() == pytest.approx((0.9 * 0.8, 1.3 * 1.25))
    assert {0.8, 1.2} <= set(axis.get_xticks().round(3))  # a narrow range has more ticks
    assert fit_figure([Result(Path("d"), bench_results.decode())]) is None


def test_heads_of_sparse_variants_are_points():
    figure = recall_figure([Result(Path("r"), bench_results.recall())])
    assert names(figure) == ["made-up, 64K, sparse"]
    heads, mean = figure.axes[0].get_lines()
    assert len(heads.get_xdata()) == 24
    assert len(mean.get_xdata()) == 1
    assert recall_figure([Result(Path("d"), bench_results.decode())]) is None
