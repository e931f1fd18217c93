"""Process groups: gloo groups of threads in one process. NCCL is in tests/gpu."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from workers.transport import groups
from workers.transport.groups import NCCL_SETTINGS, abort, limit, make_group

CPU = torch.device("cpu")


def pair_of_groups(timeout_s: float = 20.0) -> list[Any]:
    store = dist.HashStore()
    made: list[Any] = [None, None]

    def join(rank: int) -> None:
        made[rank] = make_group(store, rank, 2, CPU, timeout_s)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert None not in made
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_members_send_to_each_other(dtype: torch.dtype):
    first, second = pair_of_groups()
    sent, came = torch.arange(67).to(dtype), torch.zeros(67, dtype=dtype)
    works = [first.send([sent], 1, 0), second.recv([came], 0, 0)]
    for work in works:
        work.wait()
    assert torch.equal(sent, came)


def test_a_member_that_does_not_come_is_an_error():
    with pytest.raises(RuntimeError):
        make_group(dist.HashStore(), 0, 2, CPU, 0.2)


def test_the_limit_holds_for_reductions_that_begin_later():
    group, _other = pair_of_groups()
    limit(group, 0.2)
    began = time.monotonic()
    work = group.allreduce([torch.zeros(3)])
    with pytest.raises(RuntimeError, match="Timed out waiting 200ms"):
        work.wait()
    assert time.monotonic() - began < 10


def test_gloo_needs_no_abort():
    first, second = pair_of_groups()
    abort(first, CPU)
    works = [group.allreduce([torch.ones(1)]) for group in (first, second)]
    for work in works:
        work.wait()


def test_nccl_is_told_not_to_end_the_process(monkeypatch: pytest.MonkeyPatch):
    """Before the group is made, which reads it; without NCCL it is one line."""
    seen: list[dict[str, str | None]] = []

    class Group:
        class Options:
            pass

        def __init__(self, *args: object) -> None:
            seen.append({name: os.environ.get(name) for name in (*NCCL_SETTINGS, "NCCL_SOCKET_IFNAME")})

    for name in NCCL_SETTINGS:
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.setattr(groups.dist, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.setattr(groups.dist, "is_nccl_available", lambda: True)
    make_group(dist.HashStore(), 0, 2, torch.device("cuda"), 1.0)
    ours = dict.fromkeys(NCCL_SETTINGS, "0")
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" in ours
    assert "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC" in ours, "the end of a group waits a minute for every late reduction"
    assert seen == [ours | {"NCCL_SOCKET_IFNAME": "lo"}]
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    make_group(dist.HashStore(), 0, 2, torch.device("cuda"), 1.0)
    assert seen[1:] == [ours | {"NCCL_SOCKET_IFNAME": "eth0"}], "the operator's choice stays"
    monkeypatch.setattr(groups.dist, "is_nccl_available", lambda: False)
    with pytest.raises(RuntimeError, match="this build of torch has no NCCL"):
        make_group(dist.HashStore(), 0, 2, torch.device("cuda"), 1.0)
