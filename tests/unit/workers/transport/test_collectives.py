"""Reductions among the shards of a stage: gloo groups of threads in one process."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.members import run_members
from workers.transport import collectives
from workers.transport.collectives import Collectives, GroupLost, join_group

CPU = torch.device("cpu")


def in_group(size: int, work: Callable[[Collectives], object], timeout_s: float = 20.0) -> list[object]:
    """Run `work` on every member; a member's exception takes the place of its result."""
    store = dist.HashStore()

    def member(rank: int) -> object:
        group = join_group(store, rank, size, CPU, timeout_s)
        result = work(group)
        group.close()
        group.close()
        return result

    return run_members(size, member)


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_the_sum_is_the_same_bits_on_every_shard(
    size: int, dtype: torch.dtype, shared: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collectives, "supports_shared_memory", lambda: shared)
    for shape in ((1,), (1, 7), (67, 13)):
        parts = [value(rank, shape, dtype) for rank in range(size)]
        sums = in_group(size, lambda group, parts=parts: group.all_reduce(parts[group.rank].clone()))
        assert all(torch.equal(total, sums[0]) for total in sums)
        assert sums[0].dtype == dtype
        wanted = torch.stack(parts).double().sum(0)
        tolerance = 1e-5 if dtype == torch.float32 else 0.06
        torch.testing.assert_close(sums[0].double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gathered_parts_stand_by_rank(size: int):
    gathered = in_group(size, lambda group: group.all_gather(torch.full((2, 3), float(group.rank))))
    for parts in gathered:
        assert [float(part[0, 0]) for part in parts] == list(range(size))
        assert all(part.shape == (2, 3) for part in parts)


def test_views_are_reduced_and_gathered_in_their_own_order():
    base = torch.arange(6.0).view(2, 3)
    for total in in_group(2, lambda group: group.all_reduce(base.T)):
        assert torch.equal(total, base.T * 2)
    for parts in in_group(2, lambda group: group.all_gather(base.T)):
        assert len(parts) == 2
        assert all(torch.equal(part, base.T) for part in parts)
    assert torch.equal(base, torch.arange(6.0).view(2, 3)), "a view's owner is left alone"


def test_a_member_that_never_comes_is_an_error():
    with pytest.raises(RuntimeError):
        join_group(dist.HashStore(), 0, 2, CPU, 0.3)


def test_a_member_that_leaves_is_an_error_for_the_others():
    def work(group: Collectives) -> str:
        group.all_reduce(torch.ones(1))
        if group.rank == 1:
            return "left"
        group.all_reduce(torch.ones(1))
        return "went on"

    first, second = in_group(2, work, timeout_s=1.0)
    assert second == "left"
    assert isinstance(first, RuntimeError)


def test_members_meet_again_after_one_has_left():
    """Who waits for one that leaves hears of it at once, not after the time limit."""
    stores = [dist.HashStore() for _ in range(2)]

    def work(group: Collectives) -> list[float]:
        found = []
        for store in stores:
            found.append(float(group.all_reduce(torch.ones(1))))
            if group.rank == 1:
                group.close()
            else:
                with pytest.raises(GroupLost, match="the group of the stage broke"):
                    group.all_reduce(torch.ones(1))
            group.join(store)
        return [*found, float(group.all_reduce(torch.full((1,), 1.0 + group.rank)))]

    began = time.monotonic()
    assert in_group(2, work, timeout_s=60.0) == [[2.0, 2.0, 3.0]] * 2
    assert time.monotonic() - began < 30


def test_the_limit_of_reductions_is_not_that_of_meetings():
    """It stays when the members meet again."""
    stores = [dist.HashStore() for _ in range(2)]

    def work(group: Collectives) -> float:
        group.limit(0.3)
        group.join(stores[1])
        if group.rank == 0:
            began = time.monotonic()
            with pytest.raises(GroupLost, match="Timed out waiting 300ms"):
                group.all_reduce(torch.ones(1))
            return time.monotonic() - began
        time.sleep(1.0)
        return 0.0

    seconds, _ = in_group(2, work, timeout_s=60.0)
    assert isinstance(seconds, float)
    assert seconds < 10


class FakeNccl:
    """A group whose operations are only queued; remembers whether it was aborted."""

    def __init__(self) -> None:
        self.aborted = 0

    def allreduce(self, tensors: list[torch.Tensor]) -> "FakeNccl":
        return self

    def wait(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted += 1


def test_what_an_aborted_group_computed_is_not_used(monkeypatch: pytest.MonkeyPatch):
    """On a GPU, where a dead member raises nothing; a new group is sound again."""
    made: list[FakeNccl] = []

    def make(*args: object) -> FakeNccl:
        made.append(FakeNccl())
        return made[-1]

    monkeypatch.setattr(collectives, "make_group", make)
    monkeypatch.setattr(collectives, "limit", lambda group, timeout_s: None)
    monkeypatch.setattr(collectives.torch, "zeros", lambda *args, **options: None)
    group = collectives.GroupCollectives(0, 2, torch.device("cuda"), 1.0)
    group.join(dist.HashStore())
    group.all_reduce(torch.ones(1))
    group.check()
    for reason in ("a shard is late", "second"):
        group.abort(reason)
        with pytest.raises(GroupLost, match="the group of the stage broke: a shard is late"):
            group.check()
    group.join(dist.HashStore())
    group.check()
    assert [each.aborted for each in made] == [1, 0]
    group.close()
    group.close()
    assert [each.aborted for each in made] == [1, 1]


def test_one_shard_needs_no_group():
    group = join_group(dist.HashStore(), 0, 1, CPU, 0.1)
    assert type(group) is Collectives
    tensor = torch.ones(3)
    assert group.all_reduce(tensor) is tensor
    assert group.all_gather(tensor) == [tensor]
    group.limit(1.0)
    group.abort("stages are being replaced")
    group.check()
    group.close()


def test_a_file_is_a_meeting_place(tmp_path: Path):
    path = str(tmp_path / "store")
    stores = [dist.FileStore(path, 2), dist.FileStore(path, 2)]
    stores[0].set("key", "value")
    assert stores[1].get("key") == b"value"
