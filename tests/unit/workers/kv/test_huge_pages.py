"""Advice about huge pages reaches the kernel for large host tensors, and only for these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from workers.kv.huge_pages import MIN_BYTES, advise_huge_pages

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
