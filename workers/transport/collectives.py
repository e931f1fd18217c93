"""Reductions among the shards of one stage.

All shards of a stage run on one node. They form one group through a rendezvous file, and every operation has a time
limit, so that a dead member is an error instead of a hang.
"""

from __future__ import annotations

import datetime
import functools
from typing import Any

import torch
import torch.distributed as dist

GLOO: Any = dist.ProcessGroupGloo


class Collectives:
    """Reductions over the shards of a stage; this class is the group of one shard, which has nothing to reduce."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum over the shards, in the tensor's own type and maybe in place; the same bits on every shard."""
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all shards, by rank; their shapes are equal."""
        return [tensor]

    def close(self) -> None:
        """Leave the group; may be called twice."""


class GroupCollectives(Collectives):
    """gloo (CPU) or NCCL (CUDA) among the shards of a stage."""

    def __init__(self, backend: Any, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._group = backend

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        self._group.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        out = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([out], [tensor.contiguous()]).wait()
        return out

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
    timeout = datetime.timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return GroupCollectives(dist.ProcessGroupNCCL(store, rank, size, nccl), rank, size)
    options = GLOO._Options()
    options._timeout = timeout
    options._devices = [_loopback()]
    return GroupCollectives(GLOO(store, rank, size, options), rank, size)


@functools.cache
def _loopback() -> Any:
    """Return one device for all groups of the process: each has a thread that polls every 10 ms, also when idle."""
    return GLOO.create_device(hostname="127.0.0.1")
