"""Bubbles, links, reductions and experts of timelines that are given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.bench.timeline.figures import bubbles, by_shard, expert_load, traffic
from cluster.bench.timeline.trace import ChunkTime
from protos.stage.messages import ExpertCounts, ShardSpec, Span, StepResult, StepTrace

NONE = Span(0, 0)


def chunk(stage: int, start: int, came: float, ended: float, rank: int = 0, **more: float) -> ChunkTime:
    base = ChunkTime(stage, rank, start, 10, came, came, ended, ended, 0, 0.0, 0)
    return replace(base, **more)  # type: ignore[arg-type]


# two stages, three chunks: stage 1 waits for the second one for 0.5 s
PIPELINE = [
    chunk(0, 0, 0.0, 1.0, sent_s=1.1, sent_bytes=2 << 20), chunk(0, 10, 1.1, 2.5, sent_s=2.5, sent_bytes=2 << 20),
    chunk(0, 20, 2.5, 3.5, sent_s=3.7, sent_bytes=2 << 20),
    chunk(1, 0, 1.1, 2.0, began_s=0.5), chunk(1, 10, 2.5, 3.5, began_s=2.0), chunk(1, 20, 3.7, 4.7, began_s=3.4),
]  # fmt: skip


def test_bubbles_are_idle_time_between_the_first_and_the_last_chunk():
    found = bubbles(PIPELINE)
    first, second = found["shards"]
    assert (first["busy_s"], first["window_s"], first["share"]) == (3.4, 3.5, round(0.1 / 3.5, 4))
    assert (second["busy_s"], second["window_s"], second["share"]) == (2.9, 3.6, round(0.7 / 3.6, 4))
    assert found["share"] == round(0.8 / 7.1, 4)
    assert found["with_fill"] == round(1 - 6.3 / (2 * 4.7), 4)
    assert bubbles([]) == {}


def test_shards_are_in_order():
    mixed = [chunk(1, 0, 0, 1, rank=1), chunk(0, 0, 0, 1, rank=1), chunk(0, 0, 0, 1), chunk(0, 10, 1, 2)]
    assert [(at, len(own)) for at, own in by_shard(mixed).items()] == [((0, 0), 2), ((0, 1), 1), ((1, 1), 1)]


def test_links_cost_what_the_sender_is_kept_and_what_a_waiting_stage_waits():
    link = traffic(PIPELINE)["link"]
    assert link["mib"] == 2.0
    assert link["send_ms"] == pytest.approx(100.0)  # the median of 0.1, 0.0 and 0.2 s
    assert link["hop_ms"] == pytest.approx(100.0)  # chunks 0 and 1 and 2 were waited for: 0.1, 0.0, 0.2
    assert link["send_share"] == round(0.3 / 3.4, 4)
    assert "all_reduce" not in traffic(PIPELINE)


def test_a_stage_that_was_busy_says_nothing_of_the_hop():
    busy = [replace(one, began_s=one.input_s) if one.stage else one for one in PIPELINE]
    late = [replace(one, began_s=9.0) if one.stage else one for one in busy]
    assert traffic(late)["link"]["hop_ms"] is None


def test_reductions_of_the_shard_that_waits_least_are_closest_to_their_cost():
    shards = [
        chunk(0, start, start, start + 8.0, rank=rank, reduce_s=seconds, reduce_bytes=3 << 20)
        for start, both in ((0, (0.2, 1.0)), (10, (0.6, 0.4)))
        for rank, seconds in enumerate(both)
    ]
    found = traffic(shards)
    assert "link" not in found
    assert found["all_reduce"] == {
        "mib": 3.0, "ms": pytest.approx(500.0), "least_ms": pytest.approx(300.0),
        "share": pytest.approx(2.2 / 32, abs=1e-4),
    }  # fmt: skip


def test_tokens_of_experts_add_up_over_chunks_and_are_cut_by_shard():
    def step(number: int, *counts: ExpertCounts) -> StepResult:
        return StepResult(number, 0, 0, 1, trace=StepTrace("n", 0, 0, 1, 1, 0, 0, 0, counts))

    results = [
        step(1, ExpertCounts(0, (1, 2, 3, 4)), ExpertCounts(1, (0, 0, 5, 5))),
        step(2, ExpertCounts(0, (1, 0, 0, 0)), ExpertCounts(1, (5, 5, 0, 0))),
        StepResult(3, 0, 1, 1),
    ]
    shards = [
        ShardSpec(stage, 2, rank, 2, NONE, NONE, NONE, Span(2 * rank, 2 * rank + 2), NONE, NONE)
        for stage in range(2) for rank in range(2)
    ]  # fmt: skip
    found = expert_load(results, shards)
    assert found["layers"] == [0, 1]
    assert found["tokens"] == [[2, 2, 3, 4], [5, 5, 5, 5]]
    assert found["shards"] == [[4, 7], [10, 10]]
    assert found["imbalance"] == [round(7 * 2 / 11, 4), 1.0]
    assert expert_load([], shards) == {}
