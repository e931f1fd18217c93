"""Bounded mailboxes and inboxes: waiting, closing, order. Links over gRPC are in the integration tests."""

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch

from protos.stage import stage_pb2 as pb
from tests.support.data.frames import DAMAGED
from workers.transport.frames import FrameError, split
from workers.transport.grpc_link import GrpcInbox, Mailbox
from workers.transport.interface import DEPTH, LinkClosed


class Background(threading.Thread):
    """Runs a call on another thread and keeps what came of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.result: object = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except Exception as error:  # noqa: BLE001 - judged by the test
            self.error = error

    def waits(self) -> bool:
        self.join(0.05)
        return self.is_alive()

    def end(self) -> "Background":
        self.join(5)
        assert not self.is_alive(), "still waiting"
        return self


def test_items_come_in_order():
    box: Mailbox[int] = Mailbox(3)
    for item in range(3):
        box.put(item)
    assert [box.get() for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("depth", [1, 2, DEPTH])
def test_put_waits_while_the_box_is_full(depth: int):
    box: Mailbox[int] = Mailbox(depth)
    for item in range(depth):
        box.put(item)
    writer = Background(lambda: box.put(depth))
    assert writer.waits()
    assert box.get() == 0
    assert writer.end().error is None
    assert [box.get() for _ in range(depth)] == list(range(1, depth + 1))


def test_get_waits_for_an_item():
    box: Mailbox[str] = Mailbox()
    reader = Background(lambda: box.get(5))
    assert reader.waits()
    box.put("x")
    assert reader.end().result == "x"


def test_get_times_out():
    with pytest.raises(TimeoutError):
        Mailbox().get(0.01)


def test_closing_wakes_readers_and_writers_at_once():
    empty: Mailbox[int] = Mailbox(1)
    full: Mailbox[int] = Mailbox(1)
    full.put(1)
    waiting = [Background(empty.get), Background(empty.get), Background(lambda: full.put(2))]
    assert all(thread.waits() for thread in waiting)
    began = time.monotonic()
    empty.close("gone")
    full.close("gone")
    for thread in waiting:
        error = thread.end().error
        assert isinstance(error, LinkClosed)
        assert str(error) == "gone"
    assert time.monotonic() - began < 1


def test_a_closed_box_is_read_to_its_end_and_keeps_its_first_reason():
    box: Mailbox[int] = Mailbox()
    box.put(1)
    box.close("first")
    box.close("second")
    with pytest.raises(LinkClosed, match="first"):
        box.put(2)
    assert box.get() == 1
    with pytest.raises(LinkClosed, match="first"):
        box.get()


def take(inbox: GrpcInbox, step: int, tensor: torch.Tensor, timeout_s: float = 1.0) -> torch.Tensor:
    return inbox.take(step, timeout_s, tensor.shape, tensor.dtype)


def test_an_inbox_gives_the_step_that_is_due():
    inbox = GrpcInbox()
    tensor = torch.ones(2, 3)
    inbox.put(4, tensor)
    assert take(inbox, 4, tensor) is tensor


def test_an_inbox_refuses_another_step():
    inbox = GrpcInbox()
    inbox.put(5, torch.ones(1))
    with pytest.raises(LinkClosed, match="activations of step 5 came where step 4 was due"):
        take(inbox, 4, torch.ones(1))


def test_an_inbox_does_not_wait_for_ever():
    with pytest.raises(LinkClosed, match=r"step 4 did not come within 0\.01 s"):
        take(GrpcInbox(), 4, torch.ones(1), 0.01)


def test_closing_an_inbox_wakes_the_stage():
    inbox = GrpcInbox()
    stage = Background(lambda: take(inbox, 1, torch.ones(1), 60.0))
    assert stage.waits()
    inbox.close("the previous stage is gone")
    assert isinstance(stage.end().error, LinkClosed)


def messages(frames: list[bytes]) -> list[pb.Frame]:
    """As they are after the wire."""
    return [pb.Frame.FromString(pb.Frame(data=frame).SerializeToString()) for frame in frames]


def test_frames_reach_the_inbox():
    inbox = GrpcInbox()
    tensors = [torch.randn(5, 7), torch.randn(1, 7).bfloat16(), torch.empty(0, 7)]
    frames = [b"".join(frame) for step, tensor in enumerate(tensors) for frame in split(tensor, step, max_payload=16)]
    inbox.receive(iter(messages(frames)))
    for step, tensor in enumerate(tensors):
        assert torch.equal(take(inbox, step, tensor), tensor)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_stream_ends_with_a_frame_error(name: str):
    inbox = GrpcInbox()
    with pytest.raises(FrameError):
        inbox.receive(iter(messages(DAMAGED[name])))
    if name == "duplicate last":  # the tensor before it was whole
        take(inbox, 5, torch.ones(80))
    with pytest.raises(LinkClosed, match="did not come within"):
        take(inbox, 5, torch.ones(80), 0.001)


def test_a_closed_inbox_ends_the_stream():
    inbox = GrpcInbox()
    inbox.close("the stage is closing")
    frame = b"".join(next(split(torch.randn(5), 0)))
    with pytest.raises(LinkClosed, match="the stage is closing"):
        inbox.receive(iter(messages([frame])))


def test_unit_tests_cannot_open_sockets():
    with socket.socket() as probe, pytest.raises(AssertionError, match="forbidden in unit tests"):
        probe.connect(("127.0.0.1", 9))
