"""Links of one node: two ends in one process, compiled and in Python."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from workers.kernels.build import load
from workers.transport import unix_link, unix_link_compiled
from workers.transport.grpc_link import LinkClosed
from workers.transport.unix_link import NearInbox, NearSender

LARGE = 1 << 20  # beyond what sockets hold

only_compiled = pytest.mark.parametrize("ends", ["compiled"], indirect=True)


@pytest.fixture(params=["compiled", "python"], autouse=True)
def ends(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(unix_link_compiled, "serves", lambda size: False)
    elif load().library is None:
        pytest.skip(load().reason)


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[NearInbox]:
    made = NearInbox(str(tmp_path / "link"), "tokens", "the last stage")
    yield made
    made.close()
    made.close()


@pytest.fixture
def sender(inbox: NearInbox, tmp_path: Path) -> Iterator[NearSender]:
    made = NearSender(str(tmp_path / "link"), depth=2)
    yield made
    made.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (1, 1024), (67, 13), (1 << 10, 193)])
def test_tensors_arrive_as_they_are(inbox: NearInbox, sender: NearSender, shape: tuple[int, int], dtype: torch.dtype):
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


def test_what_was_sent_before_anyone_took_is_kept(inbox: NearInbox, sender: NearSender):
    for step in range(2):
        sender.send(step, torch.full((1, LARGE), step))
    for step in range(2):
        assert torch.equal(inbox.take(step, 5.0, (1, LARGE), torch.int64), torch.full((1, LARGE), step))
    sender.send(2, torch.ones(3))
    assert torch.equal(inbox.take(2, 5.0, (3,), torch.float32), torch.ones(3))


def test_sending_waits_for_the_oldest_message_only(inbox: NearInbox, sender: NearSender):
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
        (5, (2,), "tokens of step 5 are damaged"),
        (5, (3, 1), "tokens of step 5 are damaged"),
    ],
)
def test_what_does_not_fit_is_refused(
    inbox: NearInbox, sender: NearSender, step: int, shape: tuple[int, ...], error: str
):
    sender.send(step, torch.arange(3))
    with pytest.raises(LinkClosed, match=error):
        inbox.take(5, 5.0, shape, torch.int64)


@pytest.mark.parametrize("size", [1, 4])  # nothing came, or too little
def test_what_does_not_come_is_an_error_in_time(inbox: NearInbox, sender: NearSender, size: int):
    if size > 1:
        sender.send(5, torch.arange(size - 1))
    began = time.monotonic()
    with pytest.raises(LinkClosed, match=r"tokens of step 5 did not come within 0\.2 s"):
        inbox.take(5, 0.2, (size,), torch.int64)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("taken", [0, 1])  # before and after the first message
def test_a_sender_that_ends_is_an_error_at_once(inbox: NearInbox, sender: NearSender, taken: int):
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
def test_closing_wakes_who_waits(inbox: NearInbox, connected: bool, tmp_path: Path):
    sender = NearSender(str(tmp_path / "link")) if connected else None
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(inbox.take, 0, 30.0, (3,), torch.int64)
        time.sleep(0.1)
        inbox.close()
        with pytest.raises(LinkClosed, match="closed"):
            waiting.result(5)
    assert not (tmp_path / "link").exists()
    if sender is not None:
        sender.close()


def test_a_receiver_that_ends_is_an_error_for_the_sender(inbox: NearInbox, sender: NearSender):
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


def test_a_neighbour_that_does_not_listen_is_an_error(tmp_path: Path):
    with pytest.raises(LinkClosed, match="the next stage does not listen"):
        NearSender(str(tmp_path / "link"))


@only_compiled
@pytest.mark.parametrize("compiled", ["sender", "inbox"])
def test_compiled_ends_and_ends_in_python_understand_each_other(
    inbox: NearInbox, sender: NearSender, compiled: str, monkeypatch: pytest.MonkeyPatch
):
    def use(end: str) -> None:
        monkeypatch.setattr(unix_link_compiled, "serves", lambda size: end == compiled)

    for step, shape in enumerate([(1,), (7,), (17, 67), (0, 3), (193, 128)]):
        tensor = torch.randn(shape).bfloat16()
        use("sender")
        sender.send(step, tensor)
        use("inbox")
        assert torch.equal(inbox.take(step, 5.0, shape, torch.bfloat16), tensor)
    use("sender")
    sender.send(9, torch.arange(3))
    use("inbox")
    with pytest.raises(LinkClosed, match="are damaged"):
        inbox.take(9, 5.0, (3,), torch.float64)


@only_compiled
def test_one_changed_bit_is_found(inbox: NearInbox, sender: NearSender, tmp_path: Path):
    """Every byte that counts, by the compiled end; what is left of the header is room."""
    message = bytearray(unix_link._message(torch.arange(2, dtype=torch.int32), 0, unix_link._seed(torch.int32, (2,))))
    sender._socket.send(message)
    assert inbox.take(0, 5.0, (2,), torch.int32).tolist() == [0, 1]
    for at in (*range(16), *range(64, 72)):
        changed = message.copy()
        changed[at] ^= 1 << at % 8
        sender._socket.send(changed)
        with pytest.raises(LinkClosed, match=r"are damaged|where step 0 was due"):
            inbox.take(0, 5.0, (2,), torch.int32)


@only_compiled
def test_a_message_in_pieces_is_put_together(inbox: NearInbox, sender: NearSender):
    """While it is waited for with eyes open and asleep."""
    whole = unix_link._message(torch.arange(100), 0, unix_link._seed(torch.int64, (100,)))
    for awake in ((0, 0), (0, 10**6), (20_000, 40_000)):
        inbox._rhythm.awake = lambda awake=awake: awake  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(inbox.take, 0, 5.0, (100,), torch.int64)
            for first in range(0, len(whole), 200):
                time.sleep(0.012)
                sender._socket.send(whole[first : first + 200])
            assert torch.equal(waiting.result(5), torch.arange(100))
        assert 10_000 < inbox._rhythm.last_us.value < 5_000_000


@only_compiled
def test_whoever_is_awake_still_gives_up_in_time(inbox: NearInbox, sender: NearSender):
    inbox._rhythm.awake = lambda: (0, 10**9)  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(LinkClosed, match=r"did not come within 0\.2 s"):
        inbox.take(5, 0.2, (3,), torch.int64)
    assert 0.15 < time.monotonic() - began < 5


@only_compiled
def test_structures_have_the_layout_of_the_compiled_ends():
    library = load().library
    assert library is not None
    sizes = (ctypes.c_int64 * 2)()
    library.longreach_link_sizes(sizes)
    assert list(sizes) == [ctypes.sizeof(unix_link_compiled.Take), ctypes.sizeof(unix_link_compiled.Send)]
