"""Reductions among the shards of one stage.

All shards of a stage run on one node. They form one group through a rendezvous file, and every operation has a time
limit, so that a dead member is an error instead of a hang. A member whose step fails leaves, which is an error at once
for those that wait for it; afterwards all of them meet again, in a group over another file.
"""

from __future__ import annotations

import datetime
import functools
from typing import Any

import torch
import torch.distributed as dist

GLOO: Any = dist.ProcessGroupGloo


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

    def close(self) -> None:
        """Leave the group; may be called twice."""


class GroupCollectives(Collectives):
    """gloo (CPU) or NCCL (CUDA) among the shards of a stage."""

    def __init__(self, rank: int, size: int, device: torch.device, timeout: datetime.timedelta) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._timeout = timeout
        self._group: Any = None

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        try:
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
        store.set_timeout(self._timeout)
        if self._device.type == "cuda":
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = self._timeout
            self._group = dist.ProcessGroupNCCL(store, self.rank, self.size, nccl)
            return
        options = GLOO._Options()
        options._timeout = self._timeout
        options._devices = [_loopback()]
        self._group = GLOO(store, self.rank, self.size, options)

    def close(self) -> None:
        self._group = None


def join_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Collectives:
    """Return the group of a stage; blocks until all `size` shards have joined.

    Args:
        store: rendezvous shared by the shards, fresh for every launch.
        device: gloo on a CPU, NCCL on a GPU.
        timeout_s: limit for the rendezvous and for every later reduction.

    Raises:
        RuntimeError: a member did not join in time.
    """
    if size == 1:
        return Collectives()
    group = GroupCollectives(rank, size, device, datetime.timedelta(seconds=timeout_s))
    group.join(store)
    return group


@functools.cache
def _loopback() -> Any:
    """Return one device for all groups of the process: each has a thread that polls every 10 ms, also when idle."""
    return GLOO.create_device(hostname="127.0.0.1")
