"""Times follow from counts: sums over chunks, the pipeline's overlap, and the keys that budgets leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.latency.measured import Costs
from cluster.latency.pipeline_work import stage_works
from cluster.latency.sparsity import budget_keys
from cluster.latency.step_work import StepCounts
from cluster.planner.forecast import last_finish, predict
from cluster.planner.memory import relayout
from cluster.planner.subject import as_sparse
from tests.support.planner.models import subject

FLOPS = Costs((0.0, 0.0, 1e-12, 0.0, 1e-12, 0.0, 0.0), "test")


def test_a_dense_prefill_is_its_arithmetic(tmp_path: Path):
    given = subject(tmp_path)
    tokens = 10_000
    always = 48 * (2048 * 128 * 2 * (32 + 4) + 2 * 2048 + 2 * 128 + 2048 * 128)
    active = always + 48 * 8 * 3 * 2048 * 768
    flops = 2 * (active * tokens + 2048 * 151936)
    attention = 4 * 48 * 32 * 128 * tokens * (tokens + 1) / 2
    assert predict(given, tokens, FLOPS).prefill_s == pytest.approx((flops + attention) * 1e-12, rel=1e-6)


def test_a_decode_step_reads_weights_and_kv(tmp_path: Path):
    given = subject(tmp_path)
    costs = Costs((0.0, 1e-12, 0.0, 1e-12, 0.0, 0.0, 0.0), "test")
    read = predict(given, 100_000, costs).decode_s / 1e-12
    always = 48 * (2048 * 128 * 2 * (32 + 4) + 2 * 2048 + 2 * 128 + 2048 * 128) + 2048 * 151936
    weights = 2 * (always + 48 * 8 * 3 * 2048 * 768)
    assert read == pytest.approx(weights + 100_000 * (96 << 10), rel=1e-6)


def test_two_stages_overlap(tmp_path: Path):
    given = subject(tmp_path)
    one, two = (predict(relayout(given, stages, 1), 65_536, FLOPS).prefill_s for stages in (1, 2))
    assert 1.85 < one / two < 2.0, "but for filling and the last, longest chunk"


@pytest.mark.parametrize(
    ("seconds", "hops", "finish"),
    [
        ([[1, 1, 1]], [9, 9, 9], 3),
        ([[1, 1, 1], [1, 1, 1]], [0, 0, 0], 4),
        ([[1, 1, 1], [2, 2, 2]], [0, 0, 0], 7),
        ([[2, 2, 2], [1, 1, 1]], [0, 0, 0], 7),
        ([[1, 1], [1, 1], [1, 1]], [0.5, 0.5], 5),
    ],
)
def test_when_the_last_stage_ends(seconds: list[list[float]], hops: list[float], finish: float):
    assert last_finish([np.array(times, float) for times in seconds], np.array(hops, float)) == finish


def test_budgets_bound_the_keys(tmp_path: Path):
    spec = as_sparse(subject(tmp_path)).spec
    assert budget_keys(spec, np.array([100.0, 1e6])).tolist() == [100.0, 1000 + 6096 + 64]
    assert budget_keys(subject(tmp_path).spec, np.array([1e6])).tolist() == [1e6], "dense"


def test_arrays_and_numbers_agree(tmp_path: Path):
    (work,) = stage_works(as_sparse(subject(tmp_path)))
    costs = (1e-4, 1e-11, 1e-12, 1e-11, 1e-12, 1e-12, 1e-9)
    rows = [(1.0, 1.0, 5.0, 5.0, 0.0), (512.0, 0.0, 9000.0, 1e6, 9000.0)]
    many = work.seconds(StepCounts(*(np.array(column) for column in zip(*rows, strict=True))), costs)
    assert np.asarray(many).tolist() == pytest.approx([work.seconds(StepCounts(*row), costs) for row in rows])
