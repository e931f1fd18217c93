"""Reductions among the shards of one stage.

All shards of a stage run on one node. They form one group through a rendezvous file, and every operation has a time
limit, so that a dead member is an error instead of a hang. Afterwards all of them meet again, in a group over another
file.

On CPUs sums go through shared memory, all else and sums on processors without it through gloo. An operation waits for
its result: a member that has left or died is an error at once for those that wait for it, one that is late at the
limit. With NCCL an operation is only queued on the device, and nobody hears of a dead member: the error comes where the
step waits for the device, at the limit, or as soon as `abort` is called, as it is when stages are being replaced.
Either way it comes before anything that the step computed is used.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from workers.transport.groups import abort, limit, make_group
from workers.transport.shared_memory import SharedSums, exchange_over, supports_shared_memory

_log = logging.getLogger(__name__)


class GroupLost(RuntimeError):
    """A member of the group is gone or has left."""


class Collectives:
    """Reductions over the shards of a stage; this class is the group of one shard, which has nothing to reduce."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over the shards, in the tensor's own type and maybe in place; the same bits on every shard.

        Raises:
            GroupLost: a member is gone.
        """
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all shards, by rank; their shapes are equal. Raises as `all_reduce`."""
        return [tensor]

    def join(self, store: dist.Store) -> None:
        """Leave the group and meet in another one.

        Args:
            store: rendezvous shared by the shards, fresh for every meeting.

        Raises:
            RuntimeError: a member did not join in time.
        """

    def limit(self, timeout_s: float) -> None:
        """Set the time limit of later reductions in seconds, in this group and in those that take its place."""

    def check(self) -> None:
        """Raise GroupLost if the group was aborted: what came of its reductions since is not to be used."""

    def abort(self, reason: str) -> None:
        """Break the group, so that a device that waits for its members goes on; called from any thread."""

    def close(self) -> None:
        """Leave the group; may be called twice."""


class GroupCollectives(Collectives):
    """Shared memory and gloo (CPU) or NCCL (CUDA) among the shards of a stage."""

    def __init__(self, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        """Args: `timeout_s` limits every meeting, and reductions until `limit` is called."""
        self.rank = rank
        self.size = size
        self._device = device
        self._meeting_s = self._timeout_s = timeout_s
        self._group: Any = None
        self._shared: SharedSums | None = None
        self._broken = ""  # why the group was aborted

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        try:
            if self._shared is not None:
                self._shared.all_reduce(tensor, self._timeout_s)
            else:
                self._group.allreduce([tensor]).wait()
        except RuntimeError as error:
            raise GroupLost(f"the group of the stage broke: {error}") from error
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            self._group.allgather([out], [tensor.contiguous()]).wait()
        except RuntimeError as error:
            raise GroupLost(f"the group of the stage broke: {error}") from error
        return out

    def join(self, store: dist.Store) -> None:
        self.close()
        group = make_group(store, self.rank, self.size, self._device, self._meeting_s)
        # NCCL connects its members with the first operation: now, and not in the first step.
        group.allreduce([torch.zeros(1, device=self._device)]).wait()
        limit(group, self._timeout_s)
        self._shared = self._share(store) if self._device.type == "cpu" else None
        self._broken, self._group = "", group

    def limit(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        if self._group is not None:
            limit(self._group, timeout_s)

    def check(self) -> None:
        if self._broken:
            raise GroupLost(f"the group of the stage broke: {self._broken}")

    def abort(self, reason: str) -> None:
        group = self._group
        if group is not None and self._device.type == "cuda" and not self._broken:
            self._broken = reason  # before kernels return from it
            abort(group, self._device)

    def close(self) -> None:
        self.abort("this shard has left it")
        if self._shared is not None:
            self._shared.close()
        self._group = self._shared = None

    def _share(self, store: dist.Store) -> SharedSums | None:
        """Return sums through shared memory, or None where members have none: then gloo sums."""
        if not supports_shared_memory():
            return None
        try:
            return SharedSums(self.rank, self.size, exchange_over(store, self.rank, self.size))
        except OSError as error:
            _log.warning("sums over shards go through TCP, which is slow: %s", error)
            return None


def join_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Collectives:
    """Return the group of a stage; blocks until all `size` shards have joined.

    Args:
        store: rendezvous shared by the shards, fresh for every launch.
        device: gloo on a CPU, NCCL on a GPU.
        timeout_s: limit for the rendezvous and, until `limit` is called, for every reduction.

    Raises:
        RuntimeError: a member did not join in time.
    """
    if size == 1:
        return Collectives()
    group = GroupCollectives(rank, size, device, timeout_s)
    group.join(store)
    return group
