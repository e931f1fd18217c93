"""A shard's step between its neighbours: tokens that come back from the last stage, and what becomes of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, ShardSpec, Span, StepPlan
from workers.runner.model_runner import StepOutput
from workers.stage import step as step_module
from workers.stage.step import Stepper
from workers.transport.collectives import GroupLost
from workers.transport.completion import DeviceLate
from workers.transport.link import Inbox, LinkClosed, Sender

NONE = Span(0, 0)


class FakeRunner:
    """Notes what it is told; computes nothing."""

    device, hidden_size, dtype = torch.device("cpu"), 4, torch.float32

    def __init__(self, stage: int = 0, stages: int = 2) -> None:
        self.shard = ShardSpec(stage, stages, 0, 1, NONE, NONE, NONE, NONE, NONE, NONE)
        self.learned: list[tuple[int, int]] = []
        self.out = StepOutput(hidden=torch.zeros(1, 4))
        self.resets = 0

    @contextmanager
    def settled_by(self, wait: Callable[[], object]) -> Iterator[None]:
        self.settle = wait
        yield

    def reset(self) -> None:
        self.resets += 1

    def prepare(self, plan: StepPlan) -> StepPlan | None:
        return plan if plan.slices else None

    def set_newest(self, sequences: list[int], tokens: list[int]) -> None:
        self.learned += list(zip(sequences, tokens, strict=True))

    def compute(self, ready: StepPlan, hidden: torch.Tensor | None, keep_logits: bool) -> StepOutput:
        return self.out


class Sent:
    """A link that remembers."""

    def __init__(self) -> None:
        self.items: list[tuple[int, torch.Tensor]] = []

    def send(self, step: int, tensor: torch.Tensor) -> None:
        self.items.append((step, tensor))

    def close(self) -> None:
        pass


def part(sequence: int, *ids: int, sample: bool = True) -> SequenceSlice:
    return SequenceSlice(sequence, 0, len(ids) or 1, 5, ids, (), 1, SampleSpec(SamplingParams(), 0) if sample else None)


def plan(step: int, *parts: SequenceSlice) -> StepPlan:
    return StepPlan(step, parts)


class First:
    """The first of several stages, with the inbox the last one writes to."""

    def __init__(self, stages: int = 2, timeout_s: float = 5.0) -> None:
        self.runner, self.inbox, self.sent = FakeRunner(0, stages), Inbox("tokens", "the last stage"), Sent()
        assert self.inbox.entry is not None
        self.last = Sender(self.inbox.entry)
        self.stepper = Stepper(self.runner, self.inbox, self.sent, timeout_s)  # type: ignore[arg-type]

    def tell(self, step: int, *tokens: int) -> None:
        self.last.send(step, torch.tensor(tokens))


def test_a_plan_without_ids_waits_for_its_token_and_for_no_other():
    first = First()
    first.stepper.step(plan(1, part(1, 5), part(2, 6), part(3, 7, 8, sample=False)))
    first.stepper.step(plan(2, part(3, 9)))
    first.tell(1, 11, 12)
    first.stepper.step(plan(3, part(2)))
    assert first.runner.learned == [(1, 11), (2, 12)]
    first.tell(2, 13)
    first.tell(3, 14)
    first.stepper.step(plan(4, part(2)))
    assert first.runner.learned[2:] == [(3, 13), (2, 14)]
    assert [step for step, _ in first.sent.items] == [1, 2, 3, 4]


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_plan_with_ids_does_not_wait(stages: int):
    first = First(stages, timeout_s=0.01)
    for step in range(1, stages + 2):
        first.stepper.step(plan(step, part(step, 5)))
    assert not first.runner.learned, "as many may be in flight"
    first.tell(1, 11)
    first.stepper.step(plan(stages + 2, part(1, 11)))
    assert first.runner.learned == [(1, 11)]


def test_a_token_that_does_not_come_is_an_error_in_time():
    first = First(timeout_s=0.05)
    first.stepper.step(plan(1, part(1, 5)))
    with pytest.raises(LinkClosed, match=r"tokens of step 1 did not come within 0\.05 s"):
        first.stepper.step(plan(2, part(1)))


def test_a_link_that_closes_ends_the_wait_at_once():
    first = First(timeout_s=60.0)
    first.stepper.step(plan(1, part(1, 5)))
    timer = threading.Timer(0.05, first.inbox.close, ["the last stage is gone"])
    timer.start()
    began = time.monotonic()
    with pytest.raises(LinkClosed, match="the last stage is gone"):
        first.stepper.step(plan(2, part(1)))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("step", "tokens", "error"),
    [
        (1, (11, 12), r"tokens of step 1 are torch.int64 \[2\] where torch.int64 \[1\] were due"),
        (2, (11,), "tokens of step 2 came where step 1 was due"),
    ],
)
def test_what_does_not_fit_is_an_error(step: int, tokens: tuple[int, ...], error: str):
    first = First()
    first.stepper.step(plan(1, part(1, 5)))
    first.tell(step, *tokens)
    with pytest.raises(LinkClosed, match=error):
        first.stepper.step(plan(2, part(1)))


def test_tokens_of_an_earlier_run_reach_nobody():
    first = First()
    first.stepper.step(plan(1, part(1, 5), part(2, 6)))
    first.stepper.reset()
    first.tell(1, 11, 12)
    first.stepper.step(plan(1, part(1, 5)))
    first.tell(1, 21)
    first.stepper.step(plan(2, part(1)))
    assert [(sequence, token) for sequence, token in first.runner.learned if sequence > 0] == [(1, 21)]


def test_a_plan_of_releases_only_touches_no_link():
    first = First(timeout_s=0.01)
    assert first.stepper.step(StepPlan(1, (), released=(1,)))[0] == StepOutput()
    assert not first.sent.items


def test_the_last_stage_tells_its_tokens():
    runner, inbox, sent = FakeRunner(1), Inbox(), Sent()
    assert inbox.entry is not None
    before = Sender(inbox.entry)
    stepper = Stepper(runner, inbox, sent, 1.0)  # type: ignore[arg-type]
    for step, tokens in ((1, ()), (2, (7, 8))):
        before.send(step, torch.zeros(1, 4))
        runner.out = StepOutput(tokens=tokens)
        stepper.step(plan(step, part(1, 5)))
    ((step, tensor),) = sent.items
    assert (step, tensor.tolist(), tensor.dtype) == (2, [7, 8], torch.int64)


def test_one_stage_alone_has_no_links():
    runner = FakeRunner(0, 1)
    runner.out = StepOutput(tokens=(7,))
    stepper = Stepper(runner, None, None, 0.01)  # type: ignore[arg-type]
    for step in range(1, 9):
        stepper.step(plan(step, part(1)))
    assert not runner.learned


# --- the end of a step -----------------------------------------------------------------------------------------------


SLICE = part(1, 5)


class Broken:
    """A group, or a link, that was aborted while the device computed; remembers what it is told."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.calls: list[str] = []

    def check(self) -> None:
        if self.error is not None:
            raise self.error

    def abort(self, reason: str) -> None:
        self.calls.append(reason)

    close = abort


@pytest.mark.parametrize("part", ["group", "inbox"])
def test_what_was_computed_from_what_did_not_come_is_not_used(part: str):
    error = GroupLost("gone") if part == "group" else LinkClosed("gone")
    group, inbox, sent = Broken(error if part == "group" else None), Broken(error if part == "inbox" else None), Sent()
    stepper = Stepper(FakeRunner(0), inbox, sent, 1.0, None, group)  # type: ignore[arg-type]
    with pytest.raises(type(error), match="gone"):
        stepper.step(plan(1, SLICE))
    assert not sent.items
    assert not stepper.is_computing


@pytest.mark.parametrize("frees", [True, False], ids=["a peer was waited for", "a kernel hangs"])
def test_a_device_that_is_late_is_freed(frees: bool, monkeypatch: pytest.MonkeyPatch):
    """The neighbours may go on with this shard if that helps; else its process has to be replaced."""
    waits: list[float] = []

    def wait(device: torch.device, timeout_s: float, check: Callable[[], object] = lambda: None) -> None:
        waits.append(timeout_s)
        if len(waits) == 1 or not frees:
            raise DeviceLate("the device has not finished within 1 s")

    monkeypatch.setattr(step_module, "wait_for_device", wait)
    group, inbox = Broken(None), Broken(None)
    stepper = Stepper(FakeRunner(0), inbox, Sent(), 1.0, None, group)  # type: ignore[arg-type]
    with pytest.raises(LinkClosed if frees else DeviceLate, match="the device has not finished within 1 s"):
        stepper.step(plan(7, part(1, 5)))
    reason = "step 7: the device has not finished within 1 s"
    assert (group.calls, inbox.calls) == ([reason], [reason])
    assert waits == [1.0, 10.0]


def test_nothing_is_read_from_a_device_that_is_late(monkeypatch: pytest.MonkeyPatch):
    """A copy to the host waits for the device without a limit."""
    read: list[str] = []

    class Reader(FakeRunner):
        def compute(self, ready: StepPlan, hidden: torch.Tensor | None, keep_logits: bool) -> StepOutput:
            self.settle()
            read.append("tokens")
            return self.out

    def wait(device: torch.device, timeout_s: float, check: Callable[[], object] = lambda: None) -> None:
        if timeout_s == 1.0:
            raise DeviceLate("the device has not finished within 1 s")

    monkeypatch.setattr(step_module, "wait_for_device", wait)
    group = Broken(None)
    stepper = Stepper(Reader(0), Broken(None), Sent(), 1.0, None, group)  # type: ignore[arg-type]
    with pytest.raises(LinkClosed, match="step 7: the device has not finished"):
        stepper.step(plan(7, part(1, 5)))
    assert not read
    assert len(group.calls) == 1
    assert not stepper.is_computing
