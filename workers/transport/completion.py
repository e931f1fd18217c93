"""Waiting for a device with a time limit: `torch.cuda.synchronize` has none, and a kernel may wait for a dead peer."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

_SPIN_S = 2e-4  # asked without a pause for so long: most of what is waited for is nearly done
_PAUSE_S = 5e-5


class DeviceLate(RuntimeError):
    """A device has not finished in time."""


def wait_for_device(device: torch.device, timeout_s: float, check: Callable[[], object] = lambda: None) -> None:
    """Wait until the device has finished what the current stream holds by now; at once on a CPU.

    Args:
        check: called while it waits and once it has finished; raises if what was computed is not to be used.

    Raises:
        DeviceLate: it has not, within `timeout_s`. And whatever `check` raises.
    """
    if device.type == "cuda":
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        poll(event.query, timeout_s, check)
    check()


def poll(is_done: Callable[[], bool], timeout_s: float, check: Callable[[], object] = lambda: None) -> None:
    """Ask until something is done. Raises as `wait_for_device`."""
    began = time.monotonic()
    while not is_done():
        check()
        waited = time.monotonic() - began
        if waited >= timeout_s:
            raise DeviceLate(f"the device has not finished within {timeout_s:g} s")
        if waited >= _SPIN_S:
            time.sleep(_PAUSE_S)
