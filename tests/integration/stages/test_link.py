"""Links of one node: two ends in one process."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.data.frames import DAMAGED, frames_of
from workers.transport.frames import DTYPES, split
from workers.transport.link import DEPTH, Inbox, LinkClosed, UnixSender

LARGE = 1 << 20  # beyond what sockets hold


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[Inbox]:
    made = Inbox("tokens", "the last stage", str(tmp_path / "link"))
    yield made
    made.close()
    made.close()


@pytest.fixture
def sender(inbox: Inbox, tmp_path: Path) -> Iterator[UnixSender]:
    made = UnixSender(str(tmp_path / "link"), depth=2)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype.is_floating_point])
@pytest.mark.parametrize("shape", [(0, 3), (1, 7), (1, 1024), (67, 13), (1 << 12, 193)])
def test_tensors_arrive_as_they_are(inbox: Inbox, sender: UnixSender, shape: tuple[int, int], dtype: torch.dtype):
    tensors = [torch.randn(shape).to(dtype) for _ in range(5)]
    with ThreadPoolExecutor(1) as threads:
        sent = threads.submit(lambda: [sender.send(at, each.T.contiguous().T) for at, each in enumerate(tensors)])
        for step, tensor in enumerate(tensors):
            assert torch.equal(inbox.take(step, 5.0, shape, dtype), tensor)
        sent.result(5)
    sender.close()
    sender.close()
    with pytest.raises(LinkClosed, match="closed"):
        sender.send(3, tensors[0])


def test_what_was_sent_before_anyone_took_is_kept(inbox: Inbox, sender: UnixSender):
    for step in range(2):
        sender.send(step, torch.full((1, LARGE), step))
    for step in range(2):
        assert torch.equal(inbox.take(step, 5.0, (1, LARGE), torch.int64), torch.full((1, LARGE), step))
    sender.send(2, torch.ones(3))
    assert torch.equal(inbox.take(2, 5.0, (3,), torch.float32), torch.ones(3))


def test_nothing_overtakes_what_is_still_to_be_written(inbox: Inbox, sender: UnixSender):
    large = torch.arange(LARGE)
    sender.send(0, large)
    sender.send(1, torch.ones(3))
    assert torch.equal(inbox.take(0, 5.0, large.shape, torch.int64), large)
    assert torch.equal(inbox.take(1, 5.0, (3,), torch.float32), torch.ones(3))


def test_sending_waits_for_the_oldest_message_only(inbox: Inbox, sender: UnixSender):
    large = torch.arange(LARGE)
    with ThreadPoolExecutor(1) as threads:
        for step in range(2):
            sender.send(step, large)
        third = threads.submit(sender.send, 2, large)
        time.sleep(0.05)
        assert not third.done()
        for step in range(3):
            assert torch.equal(inbox.take(step, 5.0, (LARGE,), torch.int64), large)
        third.result(5)


@pytest.mark.parametrize(
    ("step", "shape", "error"),
    [
        (6, (3,), "tokens of step 6 came where step 5 was due"),
        (5, (2,), r"tokens of step 5 are torch.int64 \[3\] where torch.int64 \[2\] were due"),
        (5, (3, 1), r"tokens of step 5 are torch.int64 \[3\] where torch.int64 \[3, 1\] were due"),
        (5, (4,), r"tokens of step 5 are torch.int64 \[3\] where torch.int64 \[4\] were due"),
    ],
)
def test_what_does_not_fit_is_refused(inbox: Inbox, sender: UnixSender, step: int, shape: tuple[int, ...], error: str):
    sender.send(step, torch.arange(3))
    with pytest.raises(LinkClosed, match=error):
        inbox.take(5, 5.0, shape, torch.int64)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_an_error(inbox: Inbox, sender: UnixSender, name: str):
    sender._end.sendall(b"".join(DAMAGED[name]))
    if name == "duplicate last":  # the tensor before it is whole
        inbox.take(5, 5.0, (80,), torch.float32)
    with pytest.raises(LinkClosed, match=r"^tokens: .*step \d+") as caught:
        inbox.take(5, 5.0, (80,), torch.float32)
    assert len(str(caught.value)) < 300


FRAME = frames_of(4)[0]


@pytest.mark.parametrize("sent", [0, 1, 63, 64, 65, len(FRAME) - 1])
def test_what_does_not_come_is_an_error_in_time(inbox: Inbox, sender: UnixSender, sent: int):
    sender._end.sendall(FRAME[:sent])
    began = time.monotonic()
    with pytest.raises(LinkClosed, match=r"tokens of step 5 did not come within 0\.2 s"):
        inbox.take(5, 0.2, (4,), torch.float32)
    assert 0.15 < time.monotonic() - began < 5


@pytest.mark.parametrize("sent", [1, 64, len(FRAME) - 1])
def test_a_message_cut_short_is_an_error_at_once(inbox: Inbox, sender: UnixSender, sent: int):
    sender._end.sendall(FRAME[:sent])
    sender.close()
    with pytest.raises(LinkClosed, match="the last stage is gone: it ended the link"):
        inbox.take(5, 30.0, (4,), torch.float32)


def test_a_message_in_pieces_is_put_together(inbox: Inbox, sender: UnixSender):
    whole = b"".join(frames_of(100, 200))
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(inbox.take, 5, 5.0, (100,), torch.float32)
        for first in range(0, len(whole), 50):
            time.sleep(0.01)
            sender._end.sendall(whole[first : first + 50])
        assert torch.equal(waiting.result(5), torch.arange(100.0))


@pytest.mark.parametrize("taken", [0, 1])  # before and after the first message
def test_a_sender_that_ends_is_an_error_at_once(inbox: Inbox, sender: UnixSender, taken: int):
    for step in range(taken):
        sender.send(step, torch.arange(3))
        inbox.take(step, 5.0, (3,), torch.int64)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(inbox.take, taken, 30.0, (3,), torch.int64)
        time.sleep(0.05)
        sender.close()
        with pytest.raises(LinkClosed, match="the last stage is gone: it ended the link"):
            waiting.result(5)


@pytest.mark.parametrize("connected", [False, True])
def test_closing_wakes_who_waits(inbox: Inbox, connected: bool, tmp_path: Path):
    sender = UnixSender(str(tmp_path / "link")) if connected else None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(inbox.take, 0, 30.0, (3,), torch.int64)
        time.sleep(0.1)
        inbox.close("this shard is closing")
        with pytest.raises(LinkClosed, match="this shard is closing"):
            waiting.result(5)
    with pytest.raises(LinkClosed, match="this shard is closing"):
        inbox.take(0, 30.0, (3,), torch.int64)
    assert not (tmp_path / "link").exists()
    if sender is not None:
        sender.close()


def test_a_receiver_that_ends_is_an_error_for_the_sender(inbox: Inbox, sender: UnixSender):
    with ThreadPoolExecutor(1) as threads:
        for step in range(2):
            sender.send(step, torch.arange(LARGE))
        third = threads.submit(sender.send, 2, torch.arange(LARGE))
        time.sleep(0.05)
        inbox.close()
        with pytest.raises(LinkClosed, match="link to the next stage broke"):
            third.result(5)
    with pytest.raises(LinkClosed, match="link to the next stage broke"):
        sender.send(3, torch.arange(3))


def test_a_receiver_that_ended_is_an_error_for_a_short_message(inbox: Inbox, sender: UnixSender):
    sender.send(0, torch.zeros(3))
    inbox.take(0, 5.0, (3,), torch.float32)
    inbox.close()
    for step in (1, 2):
        with pytest.raises(LinkClosed, match=r"link to the next stage broke: .*Broken pipe"):
            sender.send(step, torch.zeros(3))


def test_closing_a_sender_wakes_who_waits_for_room(sender: UnixSender):
    with ThreadPoolExecutor(1) as threads:
        for step in range(2):
            sender.send(step, torch.arange(LARGE))
        third = threads.submit(sender.send, 2, torch.arange(LARGE))
        time.sleep(0.05)
        sender.close()
        with pytest.raises(LinkClosed, match="closed"):
            third.result(5)


def test_a_neighbour_that_does_not_listen_is_an_error(tmp_path: Path):
    with pytest.raises(LinkClosed, match="the next stage does not listen"):
        UnixSender(str(tmp_path / "link"))


# --- epochs ----------------------------------------------------------------------------------------------------------


def test_visitors_of_another_epoch_are_turned_away(tmp_path: Path) -> None:
    late: list[int] = []
    inbox = Inbox("tokens", "the last stage", str(tmp_path / "link"), 3, lambda: late.append(1))
    old = UnixSender(str(tmp_path / "link"), epoch=2)
    old.send(1, torch.ones(3))
    silent = socket.socket(socket.AF_UNIX)
    silent.connect(str(tmp_path / "link"))
    silent.close()
    new = UnixSender(str(tmp_path / "link"), epoch=3)
    new.send(1, torch.zeros(3))
    assert torch.equal(inbox.take(1, 10.0, (3,), torch.float32), torch.zeros(3))
    assert len(late) == 2
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(inbox.take, 2, 10.0, (3,), torch.float32)
        for step in range(2, 2 + DEPTH):
            with contextlib.suppress(LinkClosed):
                old.send(step, torch.ones(LARGE))
        new.send(2, torch.zeros(3))
        assert torch.equal(waiting.result(10), torch.zeros(3))
    for end in (old, new, inbox):
        end.close()


def test_frames_of_an_earlier_epoch_are_dropped(tmp_path: Path) -> None:
    """As of a process that was stopped between the header and the rest, and goes on afterwards."""
    late: list[int] = []
    inbox = Inbox("tokens", "the last stage", "", 3, lambda: late.append(1))
    assert inbox.entry is not None
    for epoch in (2, 3):
        for frame in split(torch.full((5,), float(epoch)), 1, 8, epoch):
            inbox.entry.sendall(frame)
    assert torch.equal(inbox.take(1, 10.0, (5,), torch.float32), torch.full((5,), 3.0))
    assert len(late) == 3
    inbox.close()
