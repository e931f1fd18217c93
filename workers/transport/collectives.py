"""Reductions among the shards of one stage.

All shards of a stage run on one node; they meet through a file, form one group and have a bounded timeout,
so that a dead member becomes an error instead of a hang.
"""

from __future__ import annotations

import datetime
import functools
from typing import Any, Protocol

import torch
import torch.distributed as dist

GLOO: Any = dist.ProcessGroupGloo


class Collectives(Protocol):
    """What the decoder needs from its stage."""

    rank: int
    size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the shards, in the tensor's own type; may work in place. Every shard gets the same bits."""

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all shards, by rank; shapes are equal."""

    def close(self) -> None:
        """Leave the group; may be called twice."""


class SingleShard:
    """A stage of one shard: nothing to reduce."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    def close(self) -> None:
        pass


class GroupCollectives:
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


def join_group(
    store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float, address: str = "127.0.0.1"
) -> Collectives:
    """Form the group of a stage; blocks until all `size` shards have come.

    Args:
        store: rendezvous shared by the shards, fresh for every launch.
        device: cpu takes gloo, cuda NCCL.
        timeout_s: limit for the meeting and for every later reduction.
        address: IP address gloo binds to.

    Raises:
        RuntimeError: a member did not come or went away within the timeout.
    """
    if size == 1:
        return SingleShard()
    timeout = datetime.timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return GroupCollectives(dist.ProcessGroupNCCL(store, rank, size, nccl), rank, size)
    return GroupCollectives(GLOO(store, rank, size, gloo_options(timeout_s, address)), rank, size)


def gloo_options(timeout_s: float, address: str) -> Any:
    """How a gloo group is formed: the limit for every operation, and the IP address it binds to."""
    options = GLOO._Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    options._devices = [_device(address)]
    return options


@functools.cache
def _device(address: str) -> Any:
    """One for all groups of the process: each has a thread that looks for news every 10 ms, also when idle."""
    return GLOO.create_device(hostname=address)


def file_store(path: str, size: int) -> dist.Store:
    """A rendezvous through a file of the node; the path must not have been used before."""
    return dist.FileStore(path, size)
