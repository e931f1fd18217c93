"""Chunks on shards, from plans and the traces that shards report."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from cluster.bench.timeline.trace import TraceLog, as_json, chunk_times, from_json
from protos.stage.messages import SequenceSlice, StepPlan, StepResult, StepTrace


def plan(step: int, start: int, length: int, more: int = 0) -> StepPlan:
    parts = [SequenceSlice(1 + n, start, length, 100, (), (), 1) for n in range(1 + more)]
    return StepPlan(step, tuple(parts))


def result(step: int, stage: int = 0, rank: int = 0, at: int = 0, node: str = "here", **more: Any) -> StepResult:
    trace = StepTrace(node, at, at + 10, at + 110, at + 112, more.get("sent", 0), more.get("reduce", 0), 8)
    return StepResult(step, stage, rank, 100, trace=trace)


def log_of(shards: int) -> tuple[TraceLog, Any]:
    engine = SimpleNamespace(on_step=None, on_result=None)
    return TraceLog(engine, [None] * shards), engine  # type: ignore[arg-type, list-item]


def test_only_chunks_of_one_prompt_are_kept():
    log, engine = log_of(2)
    for step in (plan(1, 0, 64), plan(2, 64, 1), plan(3, 64, 36, more=1), plan(4, 64, 36)):
        engine.on_step(step, 0.5)
    for step in (1, 2, 3, 4):
        for stage in (0, 1):
            engine.on_result(result(step, stage))
    assert [one.step for one, _ in log.chunks()] == [1, 4]
    assert sorted((one.step, one.stage) for one in log.results()) == [(1, 0), (1, 1), (4, 0), (4, 1)]
    log.clear()
    assert (log.chunks(), log.results()) == ([], [])
    log.close()
    assert engine.on_step is engine.on_result is None


def test_late_results_are_waited_for():
    log, engine = log_of(2)
    engine.on_step(plan(1, 0, 64), 0.5)
    engine.on_result(result(1, 0))
    late = threading.Timer(0.05, lambda: engine.on_result(result(1, 1)))
    late.start()
    assert len(log.results(within_s=60.0)) == 2
    late.join()


def test_results_that_never_come_are_not_waited_for_long():
    log, engine = log_of(2)
    engine.on_step(plan(1, 0, 64), 0.5)
    engine.on_result(result(1, 0))
    assert len(log.results(within_s=0.0)) == 1


def test_moments_count_from_the_first_and_chunks_are_in_order():
    plans = [plan(1, 0, 64), plan(2, 64, 36)]
    results = [result(2, 1, at=5_000_400), result(1, 1, at=5_000_200), result(1, 0, at=5_000_000, sent=9)]
    chunks = chunk_times(plans, [*results, result(7, at=1)])
    assert [(one.stage, one.start, one.length) for one in chunks] == [(0, 0, 64), (1, 0, 64), (1, 64, 36)]
    first = chunks[0]
    assert (first.began_s, first.input_s, first.ended_s, first.sent_s) == (0.0, 1e-05, 0.00011, 0.000112)
    assert (first.sent_bytes, first.reduce_bytes) == (9, 8)
    assert chunks[2].began_s == 0.0004
    assert from_json(as_json(chunks)) == chunks


def test_clocks_of_two_machines_are_not_compared():
    plans = [plan(1, 0, 64)]
    assert chunk_times(plans, [result(1, 0), result(1, 1, node="there")]) == []
    assert chunk_times(plans, []) == []
