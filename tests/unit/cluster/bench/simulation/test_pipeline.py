"""The clock of a simulated pipeline: overlap, order, and dynamic chunks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.bench.simulation.pipeline import Run, simulate
from cluster.config.deployment import Deployment
from cluster.latency.measured import Costs
from cluster.planner.forecast import predict
from cluster.planner.memory import relayout
from cluster.planner.subject import as_sparse, with_chunks
from tests.support.planner.models import subject

FLAT = Costs((0.0, 0.0, 1e-12, 0.0, 0.0, 0.0, 0.0), "test")  # a chunk takes as long wherever it is
STEEP = Costs((0.0, 0.0, 1e-12, 0.0, 1e-12, 0.0, 0.0), "test")


def model(folder: Path, layers: int = 8) -> Deployment:
    return subject(folder, "cuda", num_hidden_layers=layers, vocab_size=64, eos_token_id=2)


def of_stage(run: Run, stage: int) -> list[tuple[float, float, int, int]]:
    return [tuple(bar[1:]) for bar in run.bars if bar.stage == stage]  # type: ignore[misc]


@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_chunks_fill_and_drain(tmp_path: Path, stages: int):
    given = relayout(model(tmp_path), stages, 1)
    run = simulate(with_chunks(given, False), FLAT, 20 * 2048)
    one = simulate(relayout(given, 1, 1), FLAT, 20 * 2048).seconds
    chunks = 20
    assert run.seconds == pytest.approx(one / stages * (chunks + stages - 1) / chunks, rel=0.01)
    assert run.bubbles() == pytest.approx((stages - 1) / (chunks + stages - 1), abs=0.01)


def test_bars_cover_the_prompt_in_order_without_overlap(tmp_path: Path):
    run = simulate(with_chunks(relayout(model(tmp_path), 4, 1), False), STEEP, 10_000)
    for stage in range(4):
        bars = of_stage(run, stage)
        assert [first for *_, first, _ in bars] == [0, 2048, 4096, 6144, 8192]
        assert sum(tokens for *_, tokens in bars) == 10_000
        assert all(before[1] <= after[0] for before, after in pairwise(bars))
    for stage in range(3):
        sent = [stop for _, stop, *_ in of_stage(run, stage)]
        begun = [start for start, *_ in of_stage(run, stage + 1)]
        assert all(a <= b for a, b in zip(sent, begun, strict=True))


def test_one_stage_takes_what_the_forecast_says(tmp_path: Path):
    given = model(tmp_path)
    costs = replace(STEEP, hop_s=0.0)
    assert simulate(given, costs, 50_000).seconds == pytest.approx(predict(given, 50_000, costs).prefill_s)


def test_links_and_the_head_cost_time(tmp_path: Path):
    given = relayout(model(tmp_path), 2, 1)
    plain, slow = (simulate(given, replace(FLAT, link_s=link, hop_s=hop), 20_480) for link, hop in ((0, 0), (1e-9, 5)))
    assert slow.seconds > plain.seconds + 1


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_dynamic_chunks_shrink_and_waste_less(tmp_path: Path, stages: int):
    given = relayout(model(tmp_path), stages, 1)
    fixed, dynamic = simulate(with_chunks(given, False), STEEP, 131_072), simulate(given, STEEP, 131_072)
    assert {tokens for *_, tokens in of_stage(fixed, 0)} == {2048}
    lengths = [tokens for *_, tokens in of_stage(dynamic, 0)]
    assert sum(lengths) == 131_072
    assert all(before >= after for before, after in pairwise(lengths))
    assert lengths[0] == 2048 > lengths[-1]
    assert dynamic.bubbles() < fixed.bubbles() / 1.4
    assert dynamic.seconds < fixed.seconds


def test_sparse_prompts_keep_their_cells(tmp_path: Path):
    given = relayout(as_sparse(model(tmp_path)), 2, 1)
    run = simulate(given, STEEP, 5 * 8192 + 100)
    assert [tokens for *_, tokens in of_stage(run, 1)] == [8192] * 5 + [100]
