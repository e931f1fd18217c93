"""Sums through shared memory: their bits, and members that end, leave or are late."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.support.members import run_members
from workers.transport import shared_memory
from workers.transport.shared_memory import MemberLost, SharedSums, exchange_over, supports_shared_memory

pytestmark = pytest.mark.skipif(not supports_shared_memory(), reason="no memory files, or stores are not ordered")
SLOT = 1 << 20


def among(size: int, work: Callable[[SharedSums, int], object]) -> list[object]:
    """Run `work` on every member."""
    store = dist.HashStore()
    return run_members(size, lambda rank: work(SharedSums(rank, size, exchange_over(store, rank, size)), rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [2, 3])
def test_sums_of_many_sizes_in_a_row(size: int, dtype: torch.dtype) -> None:
    """Pieces at and around the size of a slot; slots are used again and again."""
    width = torch.empty((), dtype=dtype).element_size()
    lengths = [1, 17, SLOT // width - 1, SLOT // width, SLOT // width + 1, 3 * SLOT // width + 67, 0, 5]
    parts = [
        [torch.randn(length, generator=torch.Generator().manual_seed(97 * at + rank)).to(dtype) for rank in range(size)]
        for at, length in enumerate(lengths)
    ]

    def work(group: SharedSums, rank: int) -> list[torch.Tensor]:
        sums = [own[rank].clone() for own in parts]
        for one in sums:
            group.all_reduce(one, 20.0)
        return sums

    found = among(size, work)
    for at, own in enumerate(parts):
        expected = own[0]
        for part in own[1:]:
            expected = expected + part  # in the type, by rank
        for sums in found:
            assert isinstance(sums, list), sums
            assert torch.equal(sums[at], expected)


@pytest.mark.parametrize("group_made", [False, True], ids=["group outside", "group inside"])
def test_tensors_of_inference_mode_are_summed_by_threads_outside_of_it(group_made: bool) -> None:
    """As gloo does it; and the other way round."""
    store = dist.HashStore()

    def work(rank: int) -> list[float]:
        with torch.inference_mode(group_made):
            group = SharedSums(rank, 2, exchange_over(store, rank, 2))
        with torch.inference_mode():
            inside = torch.full((5,), rank + 1.0)
        outside = torch.full((5,), rank + 2.0)
        group.all_reduce(inside, 20.0)
        with torch.inference_mode():
            group.all_reduce(outside, 20.0)
        return inside.tolist() + outside.tolist()

    assert run_members(2, work) == [[3.0] * 5 + [5.0] * 5] * 2


def test_a_member_that_leaves_is_an_error_at_once_but_not_before_its_last_sum() -> None:
    def work(group: SharedSums, rank: int) -> float:
        if rank == 1:
            group.all_reduce(torch.ones(3), 60.0)
            group.close()
            return 0.0
        time.sleep(0.3)  # rank 1 has left when this one looks
        one = torch.ones(3)
        group.all_reduce(one, 60.0)
        assert one.tolist() == [2.0] * 3
        began = time.monotonic()
        with pytest.raises(MemberLost, match="shard 1 has ended"):
            group.all_reduce(torch.ones(3), 60.0)
        return time.monotonic() - began

    seconds, left = among(2, work)
    assert left == 0.0
    assert isinstance(seconds, float), seconds
    assert seconds < 10


def test_a_late_member_is_an_error_at_the_limit() -> None:
    def work(group: SharedSums, rank: int) -> None:
        if rank == 1:
            time.sleep(1.0)
            return
        with pytest.raises(MemberLost, match="Timed out waiting 200ms for shard 1"):
            group.all_reduce(torch.ones(1), 0.2)

    assert among(2, work) == [None, None]


def _sum_until_killed(path: str) -> None:
    store = dist.FileStore(path, 2)
    group = SharedSums(1, 2, exchange_over(store, 1, 2))
    group.all_reduce(torch.ones(3), 60.0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_at_once(tmp_path: object) -> None:
    """Even before its parent has asked for its exit status."""
    path = f"{tmp_path}/store"
    process = multiprocessing.get_context("spawn").Process(target=_sum_until_killed, args=(path,))
    process.start()
    group = SharedSums(0, 2, exchange_over(dist.FileStore(path, 2), 0, 2))
    group.all_reduce(torch.ones(3), 60.0)
    began = time.monotonic()
    with pytest.raises(MemberLost, match="shard 1 has ended"):
        group.all_reduce(torch.ones(3), 60.0)
    assert time.monotonic() - began < 10
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_memory_that_cannot_be_mapped_is_an_error_for_all() -> None:
    store = dist.HashStore()

    def member(rank: int) -> SharedSums:
        meet = exchange_over(store, rank, 2)
        return SharedSums(rank, 2, lambda text: [one.replace("/fd/", f"/fd{rank or ''}/") for one in meet(text)])

    results = run_members(2, member)
    assert all("shard 1 cannot map the memory of another" in str(one) for one in results), results


def test_a_member_without_a_memory_file_is_an_error_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(*args: object) -> int:
        raise OSError("no files left")

    monkeypatch.setattr(shared_memory.os, "memfd_create", create)
    results = among(2, lambda group, rank: None)
    assert all("shard 0 gets no memory file: no files left" in str(one) for one in results), results


def test_files_are_closed_with_the_group() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert among(2, lambda group, rank: group.close()) == [None, None]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
