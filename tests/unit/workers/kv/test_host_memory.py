"""Advice about memory reaches the kernel: huge pages for large host tensors, pages that are given at once."""

from __future__ import annotations

import mmap
import platform
import struct
from pathlib import Path

import pytest
import torch

from workers.kv.host_memory import MIN_BYTES, advise_huge_pages, commit_memory

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def _is_advised(tensor: torch.Tensor) -> bool:
    """Whether the mapping in the middle of the tensor carries the flag `hg` of /proc/self/smaps."""
    middle, inside = tensor.data_ptr() + tensor.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(" ", 1)[0].endswith(":"):
            low, high = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
            inside = low <= middle < high
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(not SETTING.exists(), reason="this kernel has no transparent huge pages")
def test_large_tensors_are_advised() -> None:
    tensor = torch.empty(1 << 26, dtype=torch.uint8)
    assert advise_huge_pages(tensor) is tensor
    assert _is_advised(tensor)
    tensor.fill_(7)
    assert int(tensor.sum(dtype=torch.int64)) == 7 << 26


def test_small_and_foreign_tensors_are_left_alone() -> None:
    for tensor in (torch.empty(MIN_BYTES - 1, dtype=torch.uint8), torch.empty(1 << 26, device="meta")):
        assert advise_huge_pages(tensor) is tensor


def _resident(tensor: torch.Tensor) -> int:
    """Bytes under a tensor that have memory, by /proc/self/pagemap."""
    page = mmap.PAGESIZE
    first, last = tensor.data_ptr() // page, (tensor.data_ptr() + tensor.nbytes - 1) // page
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(8 * first)
        entries = file.read(8 * (last + 1 - first))
    return page * sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", entries))


@pytest.mark.skipif(tuple(map(int, platform.release().split(".")[:2])) < (5, 14), reason="of newer kernels")
def test_committed_memory_is_there_and_keeps_its_content() -> None:
    tensor = torch.frombuffer(mmap.mmap(-1, 1 << 26), dtype=torch.uint8)  # fresh, whatever the allocator keeps
    tensor[:3] = 7
    assert _resident(tensor) < 1 << 24
    commit_memory(tensor[: 1 << 25])
    assert 1 << 25 <= _resident(tensor) < 1 << 26
    assert tensor[:3].tolist() == [7, 7, 7]
    for nothing in (tensor[:0], torch.empty(1 << 26, device="meta")):
        commit_memory(nothing)
