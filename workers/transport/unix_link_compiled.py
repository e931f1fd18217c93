"""Binding of the compiled ends of a near link: one call a message, for a decode step that waits for it.

The twin is in `near`; it serves long messages, whose checksum zlib computes faster, and machines without a compiler.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque

import torch

from workers.kernels.build import load

MOST_BYTES = 1 << 18  # of a message that is taken here
_LATE, _ENDED = 1, 2
_WAITS = 3
_EARLY_US = 500
_UNSTEADY_US = 4000  # waits that differ by more have no rhythm


def _call(pointer: str, sizes: str) -> type[ctypes.Structure]:
    fields: list[tuple[str, type]] = [(pointer, ctypes.c_void_p), *((name, ctypes.c_int64) for name in sizes.split())]
    return type(pointer, (ctypes.Structure,), {"_fields_": [*fields, ("socket", ctypes.c_int32)]})


Take = _call("message", "bytes step seed timeout_us awake_from_us awake_until_us waited_us")
Send = _call("body", "bytes step seed")


class Early:
    """A message whose body is still being computed: it is sent where that ends."""

    def __init__(self, socket: int, body: torch.Tensor, step: int, seed: int) -> None:
        """Args: `body` is contiguous and stays where it is."""
        self.body = body
        self.call = Send(body.data_ptr(), body.numel() * body.element_size(), step, seed, socket)
        self.step, self.seed = step, seed
        self.sent = ctypes.c_int64(0)  # as `longreach_send` tells it; 0: nothing is on its way


class Rhythm:
    """Tells from the last waits for messages when the next one will come.

    A core that sleeps takes some 0.1 ms longer to go on. Decode steps have a rhythm, so a stage is awake shortly before
    its message is due, and sleeps for the rest of its wait.
    """

    def __init__(self) -> None:
        self.last_us = ctypes.c_int64(-1)  # the newest wait, as the compiled function tells it; -1: noted already
        self._waits: deque[int] = deque(maxlen=_WAITS)

    def awake(self) -> tuple[int, int]:
        """From when to when of the next wait to be awake, in microseconds; (0, 0) where no rhythm is known."""
        if self.last_us.value >= 0:
            self._waits.append(self.last_us.value)
            self.last_us.value = -1
        shortest, longest = min(self._waits, default=0), max(self._waits, default=0)
        if len(self._waits) < _WAITS or longest - shortest > _UNSTEADY_US:
            return 0, 0
        early = min(_EARLY_US, shortest // 4)
        return shortest - early, longest + early


def serves(size: int) -> bool:
    """Whether messages of this many bytes are taken here."""
    return size <= MOST_BYTES and load().library is not None


def take(socket: int, message: torch.Tensor, step: int, seed: int, timeout_s: float, rhythm: Rhythm) -> bool:
    """Fill `message` (uint8, header and body) from a descriptor; whether step and checksum are what was due.

    Raises:
        TimeoutError: it did not come in time, or not whole.
        OSError: the other end is gone.
    """
    library = load().library
    assert library is not None
    call = Take(
        message.data_ptr(), message.numel(), step, seed, int(timeout_s * 1e6), *rhythm.awake(),
        ctypes.addressof(rhythm.last_us), socket,
    )  # fmt: skip
    status = int(library.longreach_take(ctypes.byref(call)))
    if status == _LATE:
        raise TimeoutError
    if status == _ENDED:
        raise ConnectionResetError("it ended the link")
    if status < 0:
        raise OSError(-status, os.strerror(-status))
    return status == 0


def send(message: Early) -> None:
    """Write a message without waiting, as far as the socket takes it."""
    library = load().library
    assert library is not None
    library.longreach_send.restype = ctypes.c_int64
    message.sent.value = int(library.longreach_send(ctypes.byref(message.call)))


def sent(message: Early) -> int:
    """How many bytes of header and body are on their way. Raises OSError: the other end is gone."""
    if message.sent.value < 0:
        raise OSError(-message.sent.value, os.strerror(-message.sent.value))
    return int(message.sent.value)
