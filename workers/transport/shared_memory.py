"""Sums among processes of one node through shared memory: some ten times the rate of gloo, which goes through TCP.

Every member has a memory file with a counter and two slots. A tensor is summed piece by piece: each member copies its
piece to one of its slots and raises its counter, waits for the counters of the others, and adds up the slots of all in
the order of ranks, so that all get the same bits. The other slot takes the next piece meanwhile: who has waited for
that one knows that everybody has read the piece before.

A member holds a lock on its file, which the kernel releases when its process ends, however it ends. That a store is
seen before a later one is a promise of x86 alone, so other processors stay with gloo.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import platform
import time
import weakref
from collections.abc import Callable
from typing import Self

import torch
import torch.distributed as dist

_HEADER = mmap.PAGESIZE
_SLOT = 1 << 20  # bytes of a piece: slots stay in a core's cache
_SPIN_S, _PAUSE_S = 200e-6, 50e-6  # a wait gives its core away at once, and sleeps when it has lasted so long
_PROBE_S = 0.01  # between two looks whether a member lives


class MemberLost(RuntimeError):
    """A member has ended or left, or is late."""


def supports_shared_memory() -> bool:
    """Return whether this system has memory files, and a processor that keeps the order of stores."""
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


def exchange_over(store: dist.Store, rank: int, size: int) -> Callable[[str], list[str]]:
    """Return a function that gives a text to every member of a meeting and returns those of all, by rank."""
    rounds = itertools.count()

    def exchange(text: str) -> list[str]:
        number = next(rounds)
        store.set(f"shared/{number}/{rank}", text)
        return [store.get(f"shared/{number}/{other}").decode() for other in range(size)]

    return exchange


class _Member:
    """The memory of one member, mapped here: `state` int64 `[2]` (pieces that are ready, whether it has left)."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        # Not where a member leaves: another thread may still be waiting, and would look at another file.
        weakref.finalize(self, os.close, descriptor)
        whole = torch.frombuffer(mmap.mmap(descriptor, _HEADER + 2 * _SLOT), dtype=torch.uint8)
        self.state = whole[:16].view(torch.int64).numpy()
        self.slots = [whole[_HEADER + at * _SLOT : _HEADER + (at + 1) * _SLOT] for at in range(2)]

    @classmethod
    def create(cls) -> Self:
        descriptor = os.memfd_create("longreach-reduce")
        os.ftruncate(descriptor, _HEADER + 2 * _SLOT)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return cls(descriptor)

    @classmethod
    def open(cls, path: str) -> Self:
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))

    def has_ended(self) -> bool:
        """Whether another member has left, or its process has ended."""
        if self.state[1]:
            return True
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)
        return True


class SharedSums:
    """The sums of one member."""

    def __init__(self, rank: int, size: int, exchange: Callable[[str], list[str]]) -> None:
        """Meet the others.

        Args:
            exchange: gives a text to every member and returns those of all, by rank; called twice.

        Raises:
            OSError: the memory of a member cannot be had; every member gets it then.
        """
        self._members: list[_Member] = []
        self._piece = 0
        path = problem = ""
        try:
            self._own = _Member.create()
            path = f"/proc/{os.getpid()}/fd/{self._own.descriptor}"
        except OSError as error:
            problem = f"shard {rank} gets no memory file: {error}"
        paths = exchange(path)
        try:
            if all(paths):
                self._members = [self._own if at == rank else _Member.open(one) for at, one in enumerate(paths)]
        except OSError as error:
            problem = f"shard {rank} cannot map the memory of another: {error}"
        problems = [each for each in exchange(problem) if each]
        if problems:
            raise OSError(problems[0])
        assert len(self._members) == size

    @torch.inference_mode()  # the tensor may come from it, and the caller's thread be outside of it
    def all_reduce(self, tensor: torch.Tensor, timeout_s: float) -> None:
        """Replace a contiguous tensor in host memory by the sum over the members.

        Raises:
            MemberLost: a member has ended or left, or did not come within the time limit.
        """
        flat = tensor.view(-1)
        for piece in flat.split(_SLOT // tensor.element_size()):
            self._piece += 1
            size = piece.numel() * piece.element_size()
            parts = [member.slots[self._piece % 2][:size].view(tensor.dtype) for member in self._members]
            own = self._own.slots[self._piece % 2][:size].view(tensor.dtype)
            own.copy_(piece)
            self._own.state[0] = self._piece
            for rank, member in enumerate(self._members):
                if member.state[0] < self._piece:
                    self._wait(rank, timeout_s)
            torch.add(parts[0], parts[1], out=piece)
            for part in parts[2:]:
                piece.add_(part)

    def close(self) -> None:
        """Leave: the others get an error where they wait for this member. Memory goes with this object."""
        self._own.state[1] = 1

    def _wait(self, rank: int, timeout_s: float) -> None:
        member, began = self._members[rank], time.monotonic()
        probe = began + _PROBE_S
        while member.state[0] < self._piece:
            now = time.monotonic()
            if now >= probe:
                probe = now + _PROBE_S
                if member.has_ended() and member.state[0] < self._piece:
                    raise MemberLost(f"shard {rank} has ended")
                if now - began > timeout_s:
                    raise MemberLost(f"Timed out waiting {timeout_s * 1000:.0f}ms for shard {rank}")
            time.sleep(0 if now - began < _SPIN_S else _PAUSE_S)
