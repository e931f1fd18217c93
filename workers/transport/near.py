"""Links between neighbours on one node: gloo point to point, received by the thread that computes.

A message is a header (epoch, step and CRC-32 as int64) and the bytes of one tensor. The receiver knows type and
shape from its plan: a step takes one message and wakes no other thread of ours. A peer that dies is an error at once.
"""

from __future__ import annotations

import datetime
import math
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from workers.transport.collectives import GLOO, gloo_options
from workers.transport.links import DEPTH, LinkClosed

_HEADER = 64  # bytes, of which 24 are used: what follows stays aligned
_FIELDS = struct.Struct("<3q")
_TAG = 0


class NearSender:
    """The sending end; what travels is kept until the other end has it, compute goes on meanwhile."""

    def __init__(self, group: Any, depth: int = DEPTH) -> None:
        """Args: `depth` messages may be under way before `send` waits."""
        self._group = group
        self._depth = depth
        self._sent: deque[tuple[Any, torch.Tensor]] = deque()  # gloo reads the message until its work is done

    def send(self, epoch: int, step: int, tensor: torch.Tensor) -> None:
        """Send the tensor of a step. Raises LinkClosed when the other end is gone or does not take it."""
        body = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        message = np.empty(_HEADER + body.size, np.uint8)  # numpy: a decode step waits for every call in here
        message[_HEADER:] = body
        crc = _checksum(body, step, tensor.dtype, tensor.shape)
        _FIELDS.pack_into(message, 0, epoch, step, crc)  # type: ignore[arg-type]
        if self._group is None:
            raise LinkClosed("closed")
        try:
            if len(self._sent) == self._depth:
                self._sent.popleft()[0].wait()
            sent = torch.from_numpy(message)
            self._sent.append((self._group.send([sent], 1, _TAG), sent))
        except RuntimeError as error:
            raise LinkClosed(f"link to the next stage broke: {_line(error)}") from error

    def close(self) -> None:
        self._group = None
        self._sent.clear()


class NearInbox:
    """The receiving end."""

    def __init__(self, group: Any, epoch: int, what: str = "activations", source: str = "the previous stage") -> None:
        """Args: `what` it takes and from whom, for messages."""
        self.epoch = epoch
        self._group = group
        self._what = what
        self._source = source

    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What came of `step`, which has this shape and type.

        Raises:
            LinkClosed: the other end is gone, nothing came in time, or something else came.
        """
        message = torch.empty(_HEADER + math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
        try:
            self._group.recv([message], 0, _TAG).wait(datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            if "Timed out" in str(error):
                raise LinkClosed(f"{self._what} of step {step} did not come within {timeout_s:g} s") from error
            raise LinkClosed(f"{self._source} is gone: {_line(error)}") from error
        raw = message.numpy()
        epoch, came, crc = _FIELDS.unpack_from(raw)  # type: ignore[arg-type]
        if (epoch, came) != (self.epoch, step):
            raise LinkClosed(
                f"{self._what} of step {came}, epoch {epoch} came where step {step}, epoch {self.epoch} was due"
            )
        if _checksum(raw[_HEADER:], step, dtype, shape) != crc:
            raise LinkClosed(f"{self._what} of step {step} are damaged (checksum differs)")
        return message[_HEADER:].view(dtype).view(tuple(shape))


def meet(path: str, rank: int, timeout_s: float, address: str) -> Any:
    """The group of two neighbours: rank 0 sends, rank 1 receives; blocks until both have come.

    Args:
        path: rendezvous file of the node, fresh for every epoch.
        timeout_s: limit for the meeting and for every message.
        address: IP address gloo binds to.

    Raises:
        RuntimeError: the other one did not come in time.
    """
    store = dist.FileStore(path, 2)
    store.set_timeout(datetime.timedelta(seconds=timeout_s))
    return GLOO(store, rank, 2, gloo_options(timeout_s, address))


def _checksum(body: np.ndarray, step: int, dtype: torch.dtype, shape: Sequence[int]) -> int:
    """CRC-32 over what the bytes are and the bytes, as in `frames`."""
    return zlib.crc32(body, zlib.crc32(f"{step} {dtype} {tuple(shape)}".encode()))  # type: ignore[arg-type]


def _line(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
