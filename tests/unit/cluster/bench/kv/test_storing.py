"""What storing costs, from pairs of runs."""

from __future__ import annotations

from typing import Any

from cluster.bench.kv.storing import judge_storing, token_ids


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
