"""Waiting for a device: limits, and what ends the wait early. On a CPU there is nothing to wait for."""

from __future__ import annotations

import time

import pytest
import torch

from workers.transport.completion import DeviceLate, poll, wait_for_device

CPU = torch.device("cpu")


def test_what_is_done_is_asked_once():
    asked: list[int] = []
    poll(lambda: bool(asked.append(1)) or True, 0.0, lambda: pytest.fail("nothing was waited for"))
    assert len(asked) == 1


def test_it_waits_until_it_is_done():
    until = time.monotonic() + 0.05
    poll(lambda: time.monotonic() >= until, 10.0)
    assert 0 <= time.monotonic() - until < 5


def test_what_is_never_done_is_late():
    began = time.monotonic()
    with pytest.raises(DeviceLate, match=r"the device has not finished within 0\.05 s"):
        poll(lambda: False, 0.05)
    assert 0.05 <= time.monotonic() - began < 5


def test_a_check_ends_the_wait():
    def check() -> None:
        raise KeyError("the link broke")

    with pytest.raises(KeyError, match="the link broke"):
        poll(lambda: False, 60.0, check)


def test_a_cpu_has_finished_but_is_checked():
    calls: list[int] = []
    wait_for_device(CPU, 0.0, lambda: calls.append(1))
    assert calls == [1]
    wait_for_device(CPU, 0.0)
