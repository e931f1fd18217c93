"""What is measured of scaling, and the efficiencies of measured rows."""

from __future__ import annotations

from typing import Any

from cluster.bench.speed.head import Layout
from cluster.bench.speed.scaling import _count, _prompts, add_efficiencies
from cluster.bench.speed.settings import Bench, BenchSettings


def row(kind: str, stages: int, length: int, seconds: float, shards: int = 1, **more: Any) -> dict[str, Any]:
    name = "tokens_per_s" if kind == "throughput" else "first_token_s"
    key = {"kind": kind, "mode": "dense", "stages": stages, "shards": shards, "length": length, **more}
    return {**key, "figures": {name: {"median": seconds, "min": seconds, "max": seconds, "mad": 0.0}}}


def test_strong_scaling_is_time_of_one_over_time_of_many():
    rows = [row("strong", 1, 64, 10.0), row("strong", 2, 64, 5.4), row("strong", 1, 64, 5.5, shards=2)]
    add_efficiencies(rows)
    assert [(one["speedup"], one["efficiency"]) for one in rows] == [(1.0, 1.0), (1.8519, 0.9259), (1.8182, 0.9091)]


def test_weak_scaling_compares_with_one_process_on_the_grown_document():
    rows = [row("weak", 1, 10, 1.0), row("weak", 1, 20, 2.6), row("weak", 2, 20, 1.3)]
    add_efficiencies(rows)
    assert (rows[2]["efficiency"], rows[2]["growth"]) == (1.0, 1.3)


def test_throughput_is_beside_one_job_of_the_same_layout():
    rows = [row("throughput", 2, 10, 100.0, jobs=1), row("throughput", 2, 10, 150.0, jobs=4)]
    rows.append(row("throughput", 1, 10, 60.0, jobs=2))
    add_efficiencies(rows)
    assert rows[1]["speedup"] == 1.5
    assert "speedup" not in rows[2]


def test_modes_are_not_compared_with_each_other():
    rows = [row("strong", 1, 64, 10.0), row("strong", 2, 64, 5.0) | {"mode": "sparse"}]
    add_efficiencies(rows)
    assert "efficiency" not in rows[1]


def test_one_process_reads_what_every_layout_of_weak_scaling_reads(tmp_path: Any):
    layouts = [Layout(1, 1), Layout(2, 1), Layout(2, 2)]
    given = {"bench": "scaling", "config": tmp_path / "x", "lengths": [100, 200], "weak_length": 50, "jobs": [1, 2],
             "layouts": [list(layout) for layout in layouts]}  # fmt: skip
    run = type("Run", (), {"bench": Bench("x", BenchSettings.model_validate(given))})()
    wanted = {"strong", "weak", "throughput"}
    assert _prompts(run, layouts[0], layouts, wanted) == {"strong": [100, 200], "weak": [50, 100, 200]}
    assert _prompts(run, layouts[2], layouts, wanted) == {"strong": [100, 200], "weak": [200]}
    assert _prompts(run, layouts[2], layouts, {"throughput"}) == {}
    assert _count(run, layouts, wanted) == (5 + 3 + 3) + 6
