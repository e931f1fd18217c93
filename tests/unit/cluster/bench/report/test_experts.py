"""The load of experts."""

from __future__ import annotations

from pathlib import Path

from cluster.bench.report.experts import expert_rows, experts_figure
from cluster.bench.report.files import Result
from tests.support.data.speed import bench_results


def test_the_row_of_most_shards_is_drawn_with_their_imbalance():
    found = expert_rows([Result(Path("s"), bench_results.scaling())])
    assert found is not None
    assert found[1]["shards"] == 2
    figure = experts_figure(*found)
    assert figure.axes[0].get_images()[0].get_array().shape == (8, 64)
    widths = [1 + bar.get_width() for bar in figure.axes[1].patches]
    assert max(abs(a - b) for a, b in zip(widths, found[1]["experts"]["imbalance"], strict=True)) < 1e-9


def test_one_shard_has_no_imbalance():
    result = Result(Path("s"), bench_results.scaling())
    assert len(experts_figure(result, result.rows[0]).axes) == 2  # experts and their colours


def test_results_without_experts_have_none():
    assert expert_rows([Result(Path("d"), bench_results.decode())]) is None
