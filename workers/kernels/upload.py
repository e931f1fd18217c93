"""Copies of weights to a GPU: through pinned memory, so that the next part is read while one is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """A `torch.cuda.Event`."""

    def record(self) -> None: ...
    def synchronize(self) -> None: ...


class Uploads:
    """Two pinned buffers that take turns; tensors in host memory are copied without them."""

    def __init__(
        self, size: int, make_event: Callable[[], Event] = torch.cuda.Event, kind: str = "cuda", pin: bool = True
    ) -> None:
        """Args: `size` of a buffer in bytes; `kind` of the devices that parts are sent to."""
        self._size, self._make_event, self._kind, self._pin = size, make_event, kind, pin
        self._buffers: list[tuple[torch.Tensor, Event]] = []  # made when the first part is sent
        self._turn = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a tensor of host memory, converted to the type of `target`, which has the same shape.

        On a GPU that happens in the order of its stream, and not before the call returns.
        """
        if target.device.type != self._kind or target.nbytes > self._size:
            target.copy_(source)
            return
        if not self._buffers:
            self._buffers = [
                (torch.empty(self._size, dtype=torch.uint8, pin_memory=self._pin), self._make_event()) for _ in range(2)
            ]
        buffer, sent = self._buffers[self._turn]
        self._turn = 1 - self._turn
        sent.synchronize()  # its part before this one
        part = buffer[: target.nbytes].view(target.dtype).view(target.shape)
        part.copy_(source)
        target.copy_(part, non_blocking=True)
        sent.record()
