"""What a stage expects of the links to its neighbours, whatever carries them.

Links carry hidden states from one stage to the next, and sampled tokens from the last stage to the first. A link is a
bounded queue: when the receiver is behind by `DEPTH` steps, `send` waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

DEPTH = 4  # tensors on a link before the sender waits


class LinkClosed(RuntimeError):
    """The other end is gone, something else than what was due came, or the link was closed."""


class Sender(Protocol):
    """The sending end of a link."""

    def send(self, step: int, tensor: torch.Tensor) -> None:
        """Queue the tensor of a step, which must not change any more; waits while the link is full.

        Raises:
            LinkClosed: the receiver is gone.
        """

    def close(self) -> None:
        """Stop; may be called twice."""


class Inbox(Protocol):
    """The receiving end of a link."""

    def take(self, step: int, timeout_s: float, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the tensor of a step, which must have this shape and type.

        Raises:
            LinkClosed: the sender is gone, nothing came in time, or something else came.
        """

    def close(self, reason: str = "closed") -> None:
        """End the link and wake who waits at it; may be called twice, the first reason stays."""


def overdue(content: str, step: int, timeout_s: float) -> LinkClosed:
    """Return the error for a tensor that did not come in time."""
    return LinkClosed(f"{content} of step {step} did not come within {timeout_s:g} s")


def check_due(
    content: str, received: int, tensor: torch.Tensor, step: int, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return `tensor`, received for step `received`, if it is the one that is due: of `step`, `shape` and `dtype`.

    Raises:
        LinkClosed: it is not; `content` ("activations", "tokens") names it in the message.
    """
    if received != step:
        raise LinkClosed(f"{content} of step {received} came where step {step} was due")
    if (tuple(shape), dtype) != (tuple(tensor.shape), tensor.dtype):
        raise LinkClosed(
            f"{content} of step {step} are {tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} were due"
        )
    return tensor
