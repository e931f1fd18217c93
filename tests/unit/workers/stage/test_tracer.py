"""Traces of steps: moments, reductions, tokens of experts."""

from __future__ import annotations

import time

import torch

from protos.stage.messages import ExpertCounts
from workers.stage.tracer import TimedCollectives, Tracer
from workers.transport.collectives import Collectives


class Group(Collectives):
    """Two shards with the same values; a reduction takes some time."""

    rank, size = 1, 2

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return tensor * 2

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor, tensor]


def test_reductions_give_what_the_group_gives_and_are_counted():
    timed = TimedCollectives(Group())
    assert (timed.rank, timed.size) == (1, 2)
    assert timed.all_reduce(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert len(timed.all_gather(torch.ones(2, dtype=torch.bfloat16))) == 2
    assert timed.bytes == 12 + 4
    assert timed.seconds >= 0.002


def test_a_step_is_reported_once_with_its_own_reductions_and_experts():
    tracer = Tracer(Group(), num_experts=4)
    assert tracer.take() is None
    tracer.collectives.all_reduce(torch.ones(8))
    tracer.count_experts(5, torch.tensor([[0, 3], [3, 1]]))
    tracer.count_experts(2, torch.tensor([[2, 2]]))
    tracer.end_step(1.0, 1.5, 2.25, 64)
    trace = tracer.take()
    assert trace is not None
    assert (trace.began_us, trace.input_us, trace.ended_us, trace.sent_bytes) == (1_000_000, 1_500_000, 2_250_000, 64)
    assert trace.reduce_bytes == 32
    assert trace.reduce_us >= 2000
    assert trace.experts == (ExpertCounts(2, [0, 0, 2, 0]), ExpertCounts(5, [1, 1, 0, 2]))
    assert tracer.take() is None
    tracer.end_step(3.0, 3.0, 3.5, 0)
    assert (trace := tracer.take()) is not None
    assert (trace.reduce_us, trace.reduce_bytes, trace.experts) == (0, 0, ())


def test_a_shard_alone_keeps_its_group():
    group = Collectives()
    tracer = Tracer(group, 0)
    assert tracer.collectives is group
    tracer.end_step(0.0, 0.0, 1.0, 0)
    assert (trace := tracer.take()) is not None
    assert (trace.reduce_us, trace.reduce_bytes) == (0, 0)
