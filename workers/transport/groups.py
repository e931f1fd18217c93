"""Process groups: gloo on a CPU, NCCL on a GPU, made over a rendezvous that is fresh for every epoch.

What a dead or late member does to the others differs. With gloo, whoever waits for a process that ended gets an error
at once, for one that is late at the group's time limit. NCCL has no such errors: its kernels wait on the device, and
what torch does about it by default is to end the process. So torch is told to do nothing (`NCCL_SETTINGS`), and the
limit is kept here: whoever waits for the device (`completion.wait_for_device`) aborts the group when the limit is over,
which makes the waiting kernels return. What they leave behind is not a result: an aborted group is an error for ever.
"""

from __future__ import annotations

import datetime
import functools
import os
from typing import Any

import torch
import torch.distributed as dist

GLOO: Any = dist.ProcessGroupGloo
# Read when a group is made.
NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # an error that NCCL reports neither aborts a group nor ends the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # else a thread that is stuck, as in a long abort, ends the process
    "TORCH_NCCL_BLOCKING_WAIT": "0",  # `wait` has the stream wait, not the thread
    # Else a watching thread, which the end of a group waits for, sleeps a minute for every operation that was late, and
    # another one writes stack traces of all threads.
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
NCCL_INTERFACE = "NCCL_SOCKET_IFNAME", "lo"  # all members are on one node, and NCCL's sockets know no token


def make_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    """Return a process group with the backend of `device`; blocks until all `size` members have come.

    Args:
        timeout_s: limit for the rendezvous; with gloo also for every later reduction, see `limit`.

    Raises:
        RuntimeError: a member did not come in time, or there is no NCCL.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store.set_timeout(timeout)
    if device.type == "cuda":
        if not dist.is_nccl_available():
            raise RuntimeError("this build of torch has no NCCL: shards and stages on GPUs need it")
        os.environ.update(NCCL_SETTINGS)
        os.environ.setdefault(*NCCL_INTERFACE)
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        group = dist.ProcessGroupNCCL(store, rank, size, nccl)
    else:
        gloo = GLOO._Options()
        gloo._timeout = timeout
        gloo._devices = [_loopback()]
        group = GLOO(store, rank, size, gloo)
    return group


def limit(group: Any, timeout_s: float) -> None:
    """Set the time limit of reductions that begin from now on; a receive has its own where it is waited for."""
    group._set_default_timeout(datetime.timedelta(seconds=timeout_s))


def abort(group: Any, device: torch.device) -> None:
    """Make kernels that wait for other members of an NCCL group return; gloo's waits end with the group or its limit.

    Called from any thread. The group cannot be used afterwards.
    """
    if device.type == "cuda":
        group.abort()


@functools.cache
def _loopback() -> Any:
    """Return one device for all groups of the process: each has a thread that polls every 10 ms, also when idle."""
    return GLOO.create_device(hostname="127.0.0.1")
