"""Links from device to device, over gloo on the CPU: both ends in one process, the control link over a socket pair."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.unit.workers.transport.test_link import Background
from workers.transport import device as device_module
from workers.transport.device import DeviceInbox, DeviceSender, Pair
from workers.transport.frames import split
from workers.transport.link import DEPTH, Inbox, LinkClosed, Sender

CPU = torch.device("cpu")


class Link:
    """Both ends of a link, and the control link between them."""

    def __init__(self, timeout_s: float = 20.0, depth: int = DEPTH, epoch: int = 0) -> None:
        store = dist.HashStore()
        pairs: dict[int, Pair] = {}

        def meet(rank: int) -> None:
            pairs[rank] = Pair(store, rank, CPU, 20.0, timeout_s)

        threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.late = 0
        self.control = Inbox("activations", on_late=self.note_late, epoch=epoch)
        assert self.control.entry is not None
        self.announcer = Sender(self.control.entry, epoch=epoch)
        self.sender = DeviceSender(self.announcer, pairs[0], timeout_s, depth)
        self.inbox = DeviceInbox(self.control, pairs[1], "activations", depth)

    def note_late(self) -> None:
        self.late += 1

    def take(self, step: int, tensor: torch.Tensor, timeout_s: float = 5.0) -> torch.Tensor:
        return self.inbox.take(step, timeout_s, tensor.shape, tensor.dtype)

    def close(self) -> None:
        self.sender.close()
        self.inbox.close()


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.close()


def ends(call: Background, seconds: float = 10.0) -> Exception:
    call.join(seconds)
    assert not call.is_alive(), "still waiting"
    assert call.error is not None
    return call.error


def send_many(link: Link, tensor: torch.Tensor) -> None:
    for step in range(20):
        link.sender.send(step, tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_tensors_come_in_order_and_unchanged(link: Link, dtype: torch.dtype):
    tensors = [torch.randn(rows, 13).to(dtype) for rows in (1, 17, 67, 193, 0, 1)]
    sending = Background(lambda: [link.sender.send(step, tensor) for step, tensor in enumerate(tensors)])
    for step, tensor in enumerate(tensors):
        got = link.take(step, tensor)
        assert got.dtype == dtype
        assert torch.equal(got, tensor)
        link.inbox.check()
    assert sending.end().error is None


def test_views_are_sent_in_their_own_order(link: Link):
    base = torch.arange(12.0).view(3, 4)
    link.sender.send(1, base.T)
    assert torch.equal(link.take(1, base.T), base.T)


def test_what_is_sent_comes_while_nobody_takes_it(link: Link):
    """A step that computes finds the input of the next one there."""
    tensors = [torch.randn(1 << 16) for _ in range(DEPTH)]
    for step, tensor in enumerate(tensors):
        link.sender.send(step, tensor)
    until = time.monotonic() + 10
    while link.inbox._posted.qsize() < DEPTH:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert all(torch.equal(link.take(step, tensor), tensor) for step, tensor in enumerate(tensors))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_receiver_that_is_behind_makes_the_sender_wait(depth: int):
    """As many are received ahead, one is announced, and as many are sent."""
    link = Link(depth=depth)
    large, count = torch.arange(1 << 20), 2 * depth + 4
    sending = Background(lambda: [link.sender.send(step, large) for step in range(count)])
    sending.join(0.5)
    assert sending.is_alive()
    assert link.inbox._posted.qsize() == depth
    for step in range(count):
        assert torch.equal(link.take(step, large), large)
    assert sending.end().error is None
    link.close()


@pytest.mark.parametrize(
    ("step", "shape", "dtype", "error"),
    [
        (5, [2, 3], torch.float32, "activations of step 4 came where step 5 was due"),
        (4, [3, 2], torch.float32, r"are torch.float32 \[2, 3\] where torch.float32 \[3, 2\] were due"),
        (4, [2, 3], torch.bfloat16, r"are torch.float32 \[2, 3\] where torch.bfloat16 \[2, 3\] were due"),
    ],
)
def test_anything_but_what_is_due_is_an_error(link: Link, step: int, shape: list[int], dtype: torch.dtype, error: str):
    link.sender.send(4, torch.zeros(2, 3))
    with pytest.raises(LinkClosed, match=error):
        link.inbox.take(step, 5.0, shape, dtype)


def test_what_does_not_come_is_an_error_in_time(link: Link):
    with pytest.raises(LinkClosed, match=r"activations of step 4 did not come within 0\.05 s"):
        link.take(4, torch.ones(1), 0.05)


def test_a_tensor_that_is_announced_and_not_sent_is_an_error_in_time():
    link = Link(timeout_s=0.3)
    link.announcer.announce(1, torch.ones(3))
    with pytest.raises(LinkClosed, match="Timed out waiting 300ms"):
        link.take(1, torch.ones(3), 60.0)
    link.close()


def test_a_receiver_that_takes_nothing_is_an_error_in_time():
    link = Link(timeout_s=0.3, depth=1)
    with pytest.raises(LinkClosed, match=r"Timed out|took nothing within"):
        send_many(link, torch.arange(1 << 20))
    link.close()


@pytest.mark.parametrize("end", ["sender", "inbox"])
def test_either_end_that_closes_is_an_error_for_the_other(link: Link, end: str):
    link.sender.send(1, torch.ones(3))
    link.take(1, torch.ones(3))
    if end == "sender":
        waiting = Background(lambda: link.take(2, torch.ones(3), 60.0))
        link.sender.close("the stage is closing")
        assert str(ends(waiting)) == "the previous stage is gone: it ended the link"
        with pytest.raises(LinkClosed, match="it ended the link"):
            link.take(2, torch.ones(3), 60.0)
    else:
        link.inbox.close("the stage is closing")
        with pytest.raises(LinkClosed, match="link to the next stage broke"):
            send_many(link, torch.ones(3))


def test_closing_wakes_who_waits_at_this_end(link: Link):
    taking = Background(lambda: link.take(1, torch.ones(3), 60.0))
    assert taking.waits()
    link.inbox.close("stages are being replaced")
    link.inbox.close("second")
    assert str(ends(taking)) == "stages are being replaced"


def test_closing_wakes_who_waits_for_room():
    link = Link(depth=1)
    sending = Background(lambda: [link.sender.send(step, torch.arange(1 << 20)) for step in range(20)])
    sending.join(0.5)
    assert sending.is_alive()
    link.sender.close("stages are being replaced")
    assert str(ends(sending)) == "stages are being replaced"
    with pytest.raises(LinkClosed, match="stages are being replaced"):
        link.sender.send(30, torch.ones(1))
    link.close()


def test_frames_with_the_tensor_in_them_are_an_error(link: Link):
    """From a process that takes the link for an ordinary one."""
    link.announcer.send(1, torch.ones(3))
    with pytest.raises(LinkClosed, match="activations: step 1: frame 0 of 1 where an announcement was due"):
        link.take(1, torch.ones(3))


def test_announcements_on_an_ordinary_link_are_an_error():
    inbox = Inbox("activations")
    assert inbox.entry is not None
    Sender(inbox.entry).announce(1, torch.ones(3))
    with pytest.raises(LinkClosed, match="activations: step 1: a tensor in 0 frames: must be at least 1"):
        inbox.take(1, 5.0, (3,), torch.float32)


@pytest.mark.parametrize(("epoch", "is_late"), [(1, True), (3, False)])
def test_another_epoch_is_dropped_if_earlier_and_an_error_if_later(epoch: int, is_late: bool):
    link = Link(epoch=2)
    assert link.control.entry is not None
    visitor = Sender(link.control.entry, epoch=epoch)
    visitor.announce(1, torch.ones(3))
    if is_late:
        visitor._queue(split(torch.ones(5), 2, epoch=epoch))
        link.sender.send(1, torch.ones(3) * 2)
        assert torch.equal(link.take(1, torch.ones(3)), torch.ones(3) * 2)
        assert link.late == 2
    else:
        with pytest.raises(LinkClosed, match="bytes of epoch 3 in epoch 2"):
            link.take(1, torch.ones(3))
    link.close()


def test_what_links_do_not_carry_is_refused(link: Link):
    with pytest.raises(ValueError, match="dtype: float64: links carry"):
        link.sender.send(1, torch.ones(3).double())
    with pytest.raises(ValueError, match="device: meta: this link carries tensors of cpu"):
        link.sender.send(1, torch.ones(3, device="meta"))


def test_an_end_alone_is_an_error():
    with pytest.raises(LinkClosed, match="the two ends of a link did not meet"):
        Pair(dist.HashStore(), 0, CPU, 0.2, 1.0)


# --- where a receive is only queued, as on a GPU ---------------------------------------------------------------------


class FakePair:
    """Two GPUs whose transfers end when nobody looks."""

    device = torch.device("cuda")

    def __init__(self) -> None:
        self.closed = self.threads = 0

    def use_on_this_thread(self) -> None:
        self.threads += 1

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> FakePair:
        self.tensor = torch.zeros(tuple(shape), dtype=dtype)
        return self

    def settle(self) -> None:
        pass

    def use(self) -> torch.Tensor:
        return self.tensor

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("ends_by", ["the sender", "this end"])
def test_a_link_that_breaks_after_take_is_noticed_at_the_check(ends_by: str):
    """The device may have gone on with what was there before."""
    control, pair = Inbox("activations"), FakePair()
    assert control.entry is not None
    sender, inbox = Sender(control.entry), DeviceInbox(control, pair)  # type: ignore[arg-type]
    sender.announce(1, torch.ones(3))
    assert inbox.take(1, 5.0, (3,), torch.float32) is pair.tensor
    inbox.check()
    if ends_by == "the sender":
        sender.close()
        reason = "the previous stage is gone: it ended the link"
        with pytest.raises(LinkClosed, match=reason):
            inbox.take(2, 5.0, (3,), torch.float32)
    else:
        reason = "stages are being replaced"
        inbox.close(reason)
    assert pair.closed, "so that the device does not wait"
    with pytest.raises(LinkClosed, match=reason):
        inbox.check()


class FakeGpu:
    """Streams that note what is queued on them and in which order; tensors are on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.stream = "compute"
        fake = SimpleNamespace(
            Stream=lambda device: FakeStream(self, "link"),
            current_stream=lambda device: FakeStream(self, self.stream),
            stream=self.on,
        )
        monkeypatch.setattr(torch, "cuda", fake)
        monkeypatch.setattr(device_module, "make_group", lambda *args: self)
        monkeypatch.setattr(device_module, "abort", lambda group, device: self.log.append("abort"))
        empty, zeros = torch.empty, torch.zeros
        monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
        monkeypatch.setattr(torch, "zeros", lambda shape, device: zeros(shape))
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: self.note("used on", stream.name))

    def note(self, *words: str) -> None:
        self.log.append(" ".join(words))

    @contextlib.contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> FakeGpu:
        self.note("send on", self.stream)
        return self

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> FakeGpu:
        self.note("receive on", self.stream)
        return self

    def wait(self) -> None:
        self.note(self.stream, "waits for the transfer")


class FakeStream:
    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu, self.name = gpu, name

    def wait_stream(self, other: FakeStream) -> None:
        self.gpu.note(self.name, "waits for", other.name)

    def record_event(self) -> FakeEvent:
        self.gpu.note("event on", self.name)
        return FakeEvent()

    def wait_event(self, event: FakeEvent) -> None:
        self.gpu.note(self.name, "waits for the event")


class FakeEvent:
    def query(self) -> bool:
        return True


def test_transfers_have_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """A send comes after what computes its tensor; a receive waits for nothing, and only its user for it."""
    gpu = FakeGpu(monkeypatch)
    pair = Pair(dist.HashStore(), 0, torch.device("cuda"), 1.0, 1.0)
    gpu.log.clear()
    pair.send(torch.ones(3)).finish()
    assert gpu.log == [
        "link waits for compute", "send on link", "link waits for the transfer", "event on link",
    ]  # fmt: skip
    gpu.log.clear()
    transfer = pair.receive((3,), torch.float32)
    transfer.settle()
    assert gpu.log == ["receive on link", "link waits for the transfer", "event on link"]
    gpu.log.clear()
    assert transfer.use().shape == (3,)
    assert gpu.log == ["compute waits for the event", "used on compute"]
    pair.close()
    pair.close()
    assert gpu.log[2:] == ["abort"]
    with pytest.raises(LinkClosed, match="the link was closed"):
        pair.send(torch.ones(3))


def test_the_thread_that_posts_receives_uses_the_gpu_of_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread begins with GPU 0, and would leave memory there when it returns to its stream."""
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    pair = FakePair()
    DeviceInbox(Inbox("activations"), pair).close()  # type: ignore[arg-type]
    assert pair.threads == 1
    Pair.use_on_this_thread(SimpleNamespace(device=torch.device("cuda", 1)))  # type: ignore[arg-type]
    Pair.use_on_this_thread(SimpleNamespace(device=CPU))  # type: ignore[arg-type]
    assert used == [torch.device("cuda", 1)]
