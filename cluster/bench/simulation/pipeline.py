"""Simulated stages under the real scheduler: when each chunk of a prompt runs on each stage, by predicted times.

The loop is the engine's: as many plans are in flight as the scheduler says, a commit makes room for the next one.
Stages compute plans in order, and wait for the stage before them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.config.deployment import Deployment
from cluster.latency.measured import Costs
from cluster.latency.model import chunk_counts
from cluster.latency.pipeline_work import dynamic_chunks, stage_works
from cluster.latency.sparsity import budget_keys
from cluster.latency.step_work import ShardWork
from cluster.planner.memory import activation_width
from cluster.scheduler.chunking import Chunk
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.request import Request, StopRules
from cluster.scheduler.scheduler import Scheduler
from protos.model.grid import is_sparse
from protos.stage.messages import SampledToken, SamplingParams, StepPlan


class Bar(NamedTuple):
    """One chunk on one stage: seconds since the start, and the positions it computes."""

    stage: int
    start_s: float
    stop_s: float
    first: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """A simulated prefill: when its last stage has ended, and every bar of its Gantt chart."""

    seconds: float
    bars: list[Bar]

    def bubbles(self) -> float:
        """Return the share of the time of all stages in which they computed nothing."""
        stages = 1 + max(bar.stage for bar in self.bars)
        busy = sum(bar.stop_s - bar.start_s for bar in self.bars)
        return 1.0 - busy / (stages * self.seconds)


class StageTimes:
    """Predicts how long each stage of a deployment computes a chunk."""

    def __init__(self, deployment: Deployment, costs: Costs) -> None:
        self._spec, self._costs = deployment.spec, costs
        self._works: list[ShardWork] = stage_works(deployment)
        self._keys = costs.keys or (lambda contexts: budget_keys(deployment.spec, contexts))
        self.hop_s = costs.hop_s
        self.token_hop_s = deployment.spec.hidden_size * activation_width(deployment) * costs.link_s

    @property
    def num_stages(self) -> int:
        return len(self._works)

    def of(self, start: int, tokens: int, prompt: int, is_last: bool = False) -> list[float]:
        """Return the seconds of a chunk on every stage; the last chunk is sampled."""
        chunk = Chunk(start, start + tokens, is_sparse(self._spec, start, prompt))
        counts = chunk_counts([chunk], self._keys)._replace(samples=np.array([float(is_last)]))
        return [float(np.sum(work.seconds(counts, self._costs.seconds))) for work in self._works]


def simulate(deployment: Deployment, costs: Costs, context: int) -> Run:
    """Return the prefill of one prompt of `context` tokens."""
    config, times = deployment.config, StageTimes(deployment, costs)
    most, page = config.prefill.max_num_batched_tokens, config.kv_cache.page_size
    pool = PagePool(-(-context // page) + 1)
    scheduler = Scheduler(
        pool, page, most, 1, spec=deployment.spec, num_stages=times.num_stages, dynamic=dynamic_chunks(deployment)
    )
    request = Request(1, [0] * context, SamplingParams(), StopRules(1))
    scheduler.prepare(request)
    scheduler.add(request)
    free = [0.0] * times.num_stages
    bars: list[Bar] = []
    in_flight: list[tuple[float, int, StepPlan]] = []  # when the last stage ends it
    now = 0.0
    while True:
        while len(in_flight) < scheduler.depth:
            if (plan := scheduler.schedule()) is None:
                break
            ended = _run(plan, times, free, now, bars)
            heapq.heappush(in_flight, (ended, plan.step, plan))
        if not in_flight:
            return Run(max(bar.stop_s for bar in bars), bars)
        ended, _, plan = heapq.heappop(in_flight)
        now = ended + times.hop_s  # until the head knows, and the next plan is there
        scheduler.commit(plan, [SampledToken(1, 0)] if plan.slices[0].sample is not None else [])


def _run(plan: StepPlan, times: StageTimes, free: list[float], now: float, bars: list[Bar]) -> float:
    """Let every stage compute a plan; returns when the last one has ended."""
    (part,) = plan.slices
    arrived = now
    for stage, seconds in enumerate(times.of(part.start, part.length, part.prompt_len, part.sample is not None)):
        start = max(free[stage], arrived)
        free[stage] = start + seconds
        bars.append(Bar(stage, start, free[stage], part.start, part.length))
        arrived = free[stage] + part.length * times.token_hop_s
    return free[-1]
