"""Links over pairs of sockets: waiting, closing, order, damage. Links of processes are in the integration tests."""

import socket
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.support.data.frames import DAMAGED
from workers.transport.frames import split
from workers.transport.link import DEPTH, Inbox, LinkClosed, Sender


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


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    made = Inbox("tokens")
    yield made
    made.close()


@pytest.fixture
def sender(inbox: Inbox) -> Iterator[Sender]:
    assert inbox.entry is not None
    made = Sender(inbox.entry)
    yield made
    made.close()


def take(inbox: Inbox, step: int, tensor: torch.Tensor, timeout_s: float = 1.0) -> torch.Tensor:
    return inbox.take(step, timeout_s, tensor.shape, tensor.dtype)


def test_tensors_come_in_order(inbox: Inbox, sender: Sender):
    tensors = [torch.randn(step, 3) for step in range(3)]
    for step, tensor in enumerate(tensors):
        sender.send(step, tensor)
    for step, tensor in enumerate(tensors):
        assert torch.equal(take(inbox, step, tensor), tensor)


@pytest.mark.parametrize("depth", [1, 2, DEPTH])
def test_sending_waits_while_the_link_is_full(inbox: Inbox, depth: int):
    assert inbox.entry is not None
    sender, large = Sender(inbox.entry, depth), torch.arange(1 << 18)
    for step in range(depth):
        sender.send(step, large)
    writer = Background(lambda: sender.send(depth, large))
    assert writer.waits()
    assert torch.equal(take(inbox, 0, large), large)
    assert writer.end().error is None
    for step in range(1, depth + 1):
        assert torch.equal(take(inbox, step, large), large)


def test_closing_wakes_who_waits_for_room_at_once(inbox: Inbox, sender: Sender):
    for step in range(DEPTH):
        sender.send(step, torch.arange(1 << 18))
    writer = Background(lambda: sender.send(DEPTH, torch.arange(1 << 18)))
    assert writer.waits()
    sender.close("gone")
    sender.close("second")
    error = writer.end().error
    assert isinstance(error, LinkClosed)
    assert str(error) == "gone"
    with pytest.raises(LinkClosed, match="gone"):
        sender.send(9, torch.ones(1))


@pytest.mark.parametrize(
    ("step", "shape", "dtype", "error"),
    [
        (5, [2, 3], torch.float32, "tokens of step 4 came where step 5 was due"),
        (4, [3, 2], torch.float32, r"are torch.float32 \[2, 3\] where torch.float32 \[3, 2\] were due"),
        (4, [6], torch.float32, r"tokens of step 4 are torch.float32 \[2, 3\] where torch.float32 \[6\] were due"),
        (4, [2, 3], torch.int64, r"tokens of step 4 are torch.float32 \[2, 3\] where torch.int64 \[2, 3\] were due"),
    ],
)
def test_anything_but_what_is_due_is_an_error(
    inbox: Inbox, sender: Sender, step: int, shape: list[int], dtype: torch.dtype, error: str
):
    sender.send(4, torch.zeros(2, 3))
    with pytest.raises(LinkClosed, match=error):
        inbox.take(step, 1.0, shape, dtype)


def test_an_inbox_does_not_wait_for_ever(inbox: Inbox):
    with pytest.raises(LinkClosed, match=r"tokens of step 4 did not come within 0\.01 s"):
        take(inbox, 4, torch.ones(1), 0.01)


def test_a_link_that_ended_is_read_to_its_end(inbox: Inbox, sender: Sender):
    sender.send(1, torch.ones(2))
    sender.close()
    assert torch.equal(take(inbox, 1, torch.ones(2)), torch.ones(2))
    with pytest.raises(LinkClosed, match="the previous stage is gone: it ended the link"):
        take(inbox, 2, torch.ones(2))


def test_a_closed_inbox_keeps_its_first_reason(inbox: Inbox, sender: Sender):
    inbox.close("first")
    inbox.close("second")
    with pytest.raises(LinkClosed, match="first"):
        take(inbox, 4, torch.ones(2))
    with pytest.raises(LinkClosed, match="link to the next stage broke"):
        sender.send(5, torch.ones(2))


def test_closing_an_inbox_wakes_the_stage(inbox: Inbox):
    stage = Background(lambda: take(inbox, 1, torch.ones(1), 60.0))
    assert stage.waits()
    inbox.close("the previous stage is gone")
    error = stage.end().error
    assert isinstance(error, LinkClosed)
    assert str(error) == "the previous stage is gone"


# --- what a gRPC stream brings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 64, 1000])
def test_a_stream_reaches_the_inbox_however_it_is_cut(inbox: Inbox, size: int):
    tensors = [torch.randn(5, 7), torch.randn(1, 7).bfloat16(), torch.empty(0, 7)]
    data = b"".join(frame for step, tensor in enumerate(tensors) for frame in split(tensor, step, max_payload=16))
    feeding = Background(lambda: inbox.feed(data[at : at + size] for at in range(0, len(data), size)))
    for step, tensor in enumerate(tensors):
        assert torch.equal(take(inbox, step, tensor), tensor)
    assert feeding.waits()
    inbox.close("the stage is closing")
    assert feeding.end().result == ("the stage is closing", False)


def test_a_stream_that_ends_is_an_error_at_once(inbox: Inbox):
    feeding = Background(lambda: inbox.feed(iter([])))
    with pytest.raises(LinkClosed, match="the previous stage is gone: it ended the link"):
        take(inbox, 0, torch.ones(1), 60.0)
    assert feeding.waits()


def test_a_stream_that_breaks_is_an_error_at_both_ends(inbox: Inbox):
    def pieces() -> Iterator[bytes]:
        yield next(split(torch.ones(1), 0))
        raise RuntimeError("lost")

    feeding = Background(lambda: inbox.feed(pieces()))
    take(inbox, 0, torch.ones(1))
    with pytest.raises(LinkClosed, match="the previous stage is gone: it ended the link"):
        take(inbox, 1, torch.ones(1), 60.0)
    assert isinstance(feeding.end().error, RuntimeError)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_stream_ends_the_link(inbox: Inbox, name: str):
    feeding = Background(lambda: inbox.feed(iter(DAMAGED[name])))
    if name == "duplicate last":  # the tensor before it was whole
        take(inbox, 5, torch.ones(80))
    with pytest.raises(LinkClosed, match=r"^tokens: .*step \d+") as caught:
        take(inbox, 5, torch.ones(80), 60.0)
    assert feeding.end().result == (str(caught.value), True)


def test_a_closed_inbox_ends_the_stream(inbox: Inbox):
    inbox.close("the stage is closing")
    assert inbox.feed(split(torch.randn(5), 0)) == ("the stage is closing", False)


def test_unit_tests_cannot_open_sockets():
    with socket.socket() as probe, pytest.raises(AssertionError, match="forbidden in unit tests"):
        probe.connect(("127.0.0.1", 9))
