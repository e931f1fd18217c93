"""How the system backs memory that every step reads: with huge pages of 2 MiB, and before it is used."""

from __future__ import annotations

import ctypes
import mmap

import torch

_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which the library does not name
MIN_BYTES = 4 << 20  # smaller tensors hold too few whole huge pages


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask the system for huge pages under a fresh contiguous tensor in host memory, before it is written.

    With 2 MiB instead of 4 KiB pages, TLB misses become rare.
    This is advice only: nothing changes for small tensors, on other devices, or where the system has no huge pages.

    Returns:
        `tensor` itself.
    """
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or tensor.nbytes < MIN_BYTES:
        return tensor
    _advise(-(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE, tensor, mmap.MADV_HUGEPAGE)
    return tensor


def commit_memory(tensor: torch.Tensor) -> None:
    """Have the system give memory under a contiguous tensor now; what is in it stays.

    Nothing happens on other devices, or where the system cannot do it (Linux before 5.14).
    """
    if tensor.device.type == "cpu" and tensor.nbytes and hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE, tensor, _POPULATE_WRITE)


def _advise(first: int, tensor: torch.Tensor, advice: int) -> None:
    """Advise about the memory from an address on to the end of a tensor; that the system cannot follow is no error."""
    size = tensor.data_ptr() + tensor.nbytes - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)
