"""One step of a shard between its neighbours: receive the input, compute, send the result."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from protos.stage.messages import StepPlan
from workers.runner.model_runner import ModelRunner, StepOutput
from workers.stage.tracer import Tracer
from workers.transport.collectives import Collectives
from workers.transport.completion import DeviceLate, wait_for_device
from workers.transport.device import DeviceInbox, DeviceSender
from workers.transport.link import Inbox, LinkClosed, Sender

_NO_SEQUENCE = -1  # no plan has it
_ABORT_S = 10.0  # a device that waits for nobody any more has ended its work after this


def max_unread(num_stages: int) -> int:
    """Return how many messages with sampled tokens may stay unread in stage 0's inbox: the depth of a prefill."""
    return max(2, num_stages)


class Stepper:
    """Drives a runner with what its neighbours send.

    A pipeline is a ring: every stage sends hidden states to the next one, and the last one the tokens it has sampled to
    the first, which continues with them when a plan has no ids for a sequence. Both sides see from the plans which
    steps sample, so nothing else needs to be said; tokens that no plan asks for are read later, in order.
    """

    def __init__(
        self, runner: ModelRunner, inbox: Inbox | DeviceInbox | None, sender: Sender | DeviceSender | None,
        timeout_s: float, tracer: Tracer | None = None, group: Collectives | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            inbox, sender: None if there is one stage.
            timeout_s: limits each wait, also that for the device.
            group: of the shards of this stage.
        """
        self._runner = runner
        self._tracer = tracer
        self._inbox = inbox
        self._sender = sender
        self._timeout_s = timeout_s
        self._group = group or Collectives()
        self.is_computing = False  # inside a step, and not waiting for a neighbour
        self._unread: deque[tuple[int, list[int]]] = deque()  # steps whose tokens are not read, with their sequences

    def reset(self) -> None:
        """Forget every sequence; tokens that are still on their way will be dropped."""
        self._runner.reset()
        self._unread = deque((step, [_NO_SEQUENCE] * len(sequences)) for step, sequences in self._unread)

    def step(self, plan: StepPlan, keep_logits: bool = False) -> tuple[StepOutput, float]:
        """Execute a plan; returns its output and the seconds it took, without those spent waiting for neighbours.

        Raises:
            PlanMismatch, RuntimeError: see `ModelRunner`. GroupLost: another shard of this stage is gone.
            LinkClosed: a neighbour is gone, or what is due did not come in time. DeviceLate: the device hangs.
        """
        runner = self._runner
        began = time.perf_counter()
        with self._computing():  # a later stage does this while the one before computes
            prepared = runner.prepare(plan)
        if prepared is None:
            return StepOutput(), 0.0
        waits = time.perf_counter()
        hidden = self._receive(plan)
        came = time.perf_counter()
        with self._computing(), runner.settled_by(lambda: self._finish(plan.step)):
            out = runner.compute(prepared, hidden, keep_logits)
            self._finish(plan.step)
        ended = time.perf_counter()
        sent_bytes = 0 if self._sender is None else self._send(plan.step, out, self._sender)
        if self._tracer is not None:
            self._tracer.end_step(began, came, ended, sent_bytes)
        return out, (ended - began) - (came - waits)

    def _finish(self, step: int) -> None:
        """Wait until the device has computed the step from all that was to come to it. Raises as `step`."""
        device = self._runner.device
        try:
            wait_for_device(device, self._timeout_s, self._check)
        except DeviceLate as error:  # a kernel hangs, or waits for a neighbour or another shard: then this ends it
            reason = f"step {step}: {error}"
            if self._inbox is not None:
                self._inbox.close(reason)
            self._group.abort(reason)
            wait_for_device(device, _ABORT_S)
            raise LinkClosed(reason) from error

    def _check(self) -> None:
        self._group.check()
        if self._inbox is not None:
            self._inbox.check()

    @staticmethod
    def _send(step: int, out: StepOutput, sender: Sender | DeviceSender) -> int:
        """Send hidden states or sampled tokens to the next stage; returns their bytes."""
        message = out.hidden
        if message is None:
            if not out.tokens:
                return 0
            message = torch.tensor(out.tokens, dtype=torch.int64)
        sender.send(step, message)
        return message.nbytes

    @contextmanager
    def _computing(self) -> Iterator[None]:
        self.is_computing = True
        try:
            yield
        finally:
            self.is_computing = False

    def _receive(self, plan: StepPlan) -> torch.Tensor | None:
        """Return the hidden states of a step `[T, M]`; None at the first stage, where the runner learns tokens."""
        runner = self._runner
        if self._inbox is None:
            return None
        if runner.shard.is_first:
            self._read_tokens(plan, self._inbox)
            return None
        shape = plan.num_tokens, runner.hidden_size
        return self._inbox.take(plan.step, self._timeout_s, shape, runner.dtype).to(runner.device, non_blocking=True)

    def _read_tokens(self, plan: StepPlan, inbox: Inbox | DeviceInbox) -> None:
        """Read the tokens the plan continues, and those of steps so old that they must have come."""
        without_ids = {part.sequence for part in plan.slices if not len(part.token_ids)}
        needed = max(
            (n for n, (_, unread) in enumerate(self._unread, 1) if not without_ids.isdisjoint(unread)), default=0
        )
        old = len(self._unread) - max_unread(self._runner.shard.num_stages)
        for _ in range(max(needed, old)):
            step, sequences = self._unread.popleft()
            tokens = inbox.take(step, self._timeout_s, (len(sequences),), torch.int64)
            self._runner.set_newest(sequences, tokens.tolist())
        if sampling := [part.sequence for part in plan.slices if part.sample is not None]:
            self._unread.append((plan.step, sampling))
