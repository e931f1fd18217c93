"""Links of one node: gloo groups of two threads in one process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from workers.transport.links import LinkClosed
from workers.transport.near import NearInbox, NearSender, meet

Ends = tuple[Any, Any]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with ThreadPoolExecutor(2) as threads:
        yield tuple(threads.map(lambda rank: meet(str(tmp_path / "link"), rank, 20.0, "127.0.0.1"), range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (1, 1024), (67, 13)])
def test_tensors_arrive_as_they_are(ends: Ends, shape: tuple[int, int], dtype: torch.dtype):
    tensors = [torch.randn(shape).to(dtype) for _ in range(3)]
    sender, inbox = NearSender(ends[0]), NearInbox(ends[1], 1)
    for step, tensor in enumerate(tensors):
        sender.send(1, step, tensor.T.contiguous().T)  # a view in another order
    for step, tensor in enumerate(tensors):
        assert torch.equal(inbox.take(step, 5.0, shape, dtype), tensor)
    sender.close()
    sender.close()
    with pytest.raises(LinkClosed, match="closed"):
        sender.send(1, 3, tensors[0])


def test_sending_waits_for_the_oldest_message_only(ends: Ends):
    sender, inbox = NearSender(ends[0], depth=2), NearInbox(ends[1], 1, "tokens")
    large = torch.arange(1 << 20)  # beyond what sockets hold
    with ThreadPoolExecutor(1) as threads:
        for step in range(2):
            sender.send(1, step, large)
        third = threads.submit(sender.send, 1, 2, large)
        time.sleep(0.05)
        assert not third.done()
        for step in range(3):
            assert torch.equal(inbox.take(step, 5.0, (1 << 20,), torch.int64), large)
        third.result(5)


@pytest.mark.parametrize(
    ("epoch", "step", "shape", "error"),
    [
        (2, 5, (3,), "tokens of step 5, epoch 2 came where step 5, epoch 1 was due"),
        (1, 6, (3,), "tokens of step 6, epoch 1 came where step 5, epoch 1 was due"),
        (1, 5, (4,), "tokens of step 5 are damaged"),
        (1, 5, (3, 1), "tokens of step 5 are damaged"),
    ],
)
def test_what_does_not_fit_is_refused(ends: Ends, epoch: int, step: int, shape: tuple[int, ...], error: str):
    sender = NearSender(ends[0])  # it must live until the message has arrived
    sender.send(epoch, step, torch.arange(3))
    with pytest.raises(LinkClosed, match=error):
        NearInbox(ends[1], 1, "tokens").take(5, 5.0, shape, torch.int64)


def test_what_does_not_come_is_an_error_in_time(ends: Ends):
    began = time.monotonic()
    with pytest.raises(LinkClosed, match=r"tokens of step 5 did not come within 0\.2 s"):
        NearInbox(ends[1], 1, "tokens").take(5, 0.2, (1,), torch.int64)
    assert time.monotonic() - began < 5


def test_a_neighbour_that_never_comes_is_an_error(tmp_path: Path):
    with pytest.raises(RuntimeError):
        meet(str(tmp_path / "link"), 0, 0.3, "127.0.0.1")
