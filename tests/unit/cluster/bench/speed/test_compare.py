"""Ratios of compared engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.bench.speed.compare import add_ratios
from cluster.bench.speed.settings import BenchSettings
from cluster.bench.speed.suite import longest_context


def row(engine: str, mode: str, seconds: float, decode: float | None = None) -> dict[str, Any]:
    figures = {"first_token_s": {"median": seconds}} | ({} if decode is None else {"decode_ms": {"median": decode}})
    return {"engine": engine, "mode": mode, "figures": figures}


def test_others_are_compared_with_our_first_mode():
    rows = [row("longreach", "dense", 2.0, 20.0), row("longreach", "sparse", 1.0, 20.0), row("theirs", "", 5.0)]
    add_ratios(rows)
    assert "ratio_first_token" not in rows[0]
    assert (rows[1]["ratio_first_token"], rows[1]["ratio_decode"]) == (0.5, 1.0)
    assert rows[2]["ratio_first_token"] == 2.5
    assert "ratio_decode" not in rows[2]


def test_the_longest_context_of_each_kind():
    class Bench:
        def __init__(self, **given: Any) -> None:
            self.settings = BenchSettings.model_validate({"config": Path("/x"), "warm_up": 0, **given})

    def longest(**given: Any) -> int:
        return longest_context(Bench(**given))  # type: ignore[arg-type]

    assert longest(bench="prefill", lengths=[100, 50]) == 102
    assert longest(bench="compare", lengths=[100], tokens=7) == 108
    assert longest(bench="scaling", lengths=[100], scaling=["strong"], job_length=10, tokens=7) == 102
    assert longest(bench="scaling", lengths=[100], weak_length=100, scaling=["weak"], layouts=[[1, 1], [2, 2]]) == 402
    assert longest(bench="scaling", weak_length=5000, scaling=["weak"], layouts=[[1, 1], [2, 2]]) == 20002
    assert longest(bench="scaling", lengths=[100], scaling=["throughput"], job_length=400, tokens=7) == 407
    assert longest(bench="decode", lengths=[100], tokens=7, warm_up=500) == 504
