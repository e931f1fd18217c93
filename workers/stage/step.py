"""One step of a shard between its neighbours: take what it needs, compute, hand on."""

from __future__ import annotations

import time
from collections import deque

import torch

from protos.stage.messages import StepPlan
from workers.runner.model_runner import ModelRunner, Prepared, StepOutput
from workers.transport.grpc_link import Sender, Source
from workers.transport.unix_link import NearSender
from workers.transport.unix_link_compiled import Early

_NOBODY = -1  # a sequence no plan names


def most_owed(num_stages: int) -> int:
    """Steps whose tokens the first stage leaves untaken: no more than are in flight while prompts are read."""
    return max(2, num_stages)


class Stepper:
    """Drives a runner with what comes from the neighbours.

    A pipeline is a ring: every stage hands hidden states to the next one, and the last one the tokens it has sampled to
    the first, which computes with them as soon as a plan brings no ids for a sequence. Both sides read from the plans
    which steps have samples, so nothing else needs to be said; tokens nobody waits for are taken later, in order.
    """

    def __init__(self, runner: ModelRunner, inbox: Source | None, sender: Sender | None, timeout_s: float) -> None:
        """Args: `inbox` and `sender` are None where there is one stage; `timeout_s` limits each wait."""
        self._runner = runner
        self._inbox = inbox
        self._sender = sender
        self._near = sender if isinstance(sender, NearSender) and runner.shard.num_ranks == 1 else None
        self._timeout_s = timeout_s
        self._owed: deque[tuple[int, list[int]]] = deque()  # steps whose tokens are to come, with their sequences

    def reset(self) -> None:
        """Forget every sequence; tokens that are still on their way will be dropped."""
        self._runner.reset()
        self._owed = deque((step, [_NOBODY] * len(sequences)) for step, sequences in self._owed)

    def step(self, plan: StepPlan, keep_logits: bool = False) -> tuple[StepOutput, float]:
        """Execute a plan; returns what came of it and the seconds it took, without waiting for neighbours.

        Raises:
            PlanMismatch, RuntimeError: see `ModelRunner`.
            LinkClosed: a neighbour is gone, or what is due did not come in time.
        """
        runner, shard = self._runner, self._runner.shard
        began = time.perf_counter()
        ready = runner.prepare(plan)
        if ready is None:
            return StepOutput(), 0.0
        early = self._early(plan, ready)
        waits = time.perf_counter()
        hidden = None
        if self._inbox is not None and shard.is_first:
            self._learn(plan, self._inbox)
        elif self._inbox is not None:
            shape = plan.num_tokens, runner.hidden_size
            hidden = self._inbox.take(plan.step, self._timeout_s, shape, runner.dtype).to(runner.device)
        waited_s = time.perf_counter() - waits
        out = runner.compute(ready, hidden, keep_logits)
        if runner.device.type == "cuda":
            torch.cuda.synchronize(runner.device)
        seconds = time.perf_counter() - began - waited_s
        if self._sender is not None:
            if early is not None and self._near is not None:
                self._near.finish(early)
            elif out.hidden is not None:
                self._sender.send(plan.step, out.hidden)
            elif out.tokens:
                self._sender.send(plan.step, torch.tensor(out.tokens, dtype=torch.int64))
        return out, seconds

    def _early(self, plan: StepPlan, ready: Prepared) -> Early | None:
        """The message with the hidden states of a step, where these leave as soon as the last layer is done."""
        if self._near is None or self._runner.shard.is_last or ready.layers.fused is None:
            return None
        ready.layers.fused.then = early = self._near.early(plan.step, ready.layers.fused.x)
        return early

    def _learn(self, plan: StepPlan, inbox: Source) -> None:
        """Take the tokens the plan continues, and those of steps so old that they must have come."""
        blind = {part.sequence for part in plan.slices if not len(part.token_ids)}
        needed = max((at for at, (_, owed) in enumerate(self._owed, 1) if not blind.isdisjoint(owed)), default=0)
        old = len(self._owed) - most_owed(self._runner.shard.num_stages)
        for _ in range(max(needed, old)):
            step, sequences = self._owed.popleft()
            tokens = inbox.take(step, self._timeout_s, (len(sequences),), torch.int64)
            self._runner.learn(sequences, tokens.tolist())
        if sampling := [part.sequence for part in plan.slices if part.sample is not None]:
            self._owed.append((plan.step, sampling))
