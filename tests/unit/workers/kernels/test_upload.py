"""Weights go to a device through two buffers, of which none is overwritten before it was sent."""

from __future__ import annotations

import torch

from tests.support.fakes.events import Events
from workers.kernels.upload import Uploads


def test_buffers_take_turns_and_parts_are_converted() -> None:
    events = Events()
    uploads = Uploads(64, events, kind="cpu", pin=False)
    source = torch.arange(34.0).view(17, 2) / 3
    target = torch.empty(17, 2, dtype=torch.bfloat16)
    for start in range(0, 17, 5):
        uploads.copy(target[start : start + 5], source[start : start + 5])
    assert torch.equal(target, source.bfloat16())
    assert events.calls == [(call, number) for number in (1, 2, 1, 2) for call in ("wait", "record")]


def test_what_stays_in_host_memory_or_is_too_large_is_copied_plainly() -> None:
    events, source = Events(), torch.arange(9.0)
    for uploads in (Uploads(64, events), Uploads(32, events, kind="cpu", pin=False)):
        target = torch.empty(9)
        uploads.copy(target, source)
        assert torch.equal(target, source)
    assert events.calls == []
