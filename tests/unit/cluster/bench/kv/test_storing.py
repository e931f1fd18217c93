"""What storing costs, from pairs of runs."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.bench.kv.storing import judge_storing, step_times, token_ids


def run(first_token_s: float, decode_ms: float, *beside: float) -> dict[str, Any]:
    return {"first_token_s": first_token_s, "decode_ms": decode_ms, "beside_prefill_ms": list(beside)}


def test_the_cost_is_the_median_over_pairs() -> None:
    plain = [run(10, 5, 100, 100, 200), run(20, 5, 100, 100, 200), run(30, 5, 100, 100, 200)]
    storing = [run(10.4, 5, 110, 110, 201), run(20.4, 5.1, 102, 500, 200), run(60, 4, 100, 100, 190)]
    report = judge_storing({"storing": storing, "not storing": plain})
    assert report["ratios"]["time of a prefill"] == [1.04, 1.02, 2.0]
    assert [(row["value"], row["met"]) for row in report["bounds"]] == [
        (0.04, True), (0.0, True), (0.1, False), (0.005, True),
    ]  # fmt: skip
    assert report["met"] is False


def test_prompts_are_repeatable_and_differ_from_the_start() -> None:
    assert token_ids(100, "a") == token_ids(100, "a")
    assert token_ids(100, "a")[:10] != token_ids(100, "b")[:10]
    assert set(token_ids(10_000, "a")) <= set(range(5, 4096))


def test_tokens_that_come_together_took_equal_parts() -> None:
    assert step_times([1.0, 2.0, 4.0]) == [1.0, 2.0]
    together = [1.0, 1.0001, 3.0, 3.0001, 3.0002, 3.0003, 3.5]
    assert step_times(together) == pytest.approx([0.5] * 4 + [0.5], abs=1e-3)
    assert step_times([]) == step_times([7.0]) == []
