"""Huge pages for memory that every step reads: with 2 MiB instead of 4 KiB pages, TLB misses become rare."""

from __future__ import annotations

import ctypes
import mmap

import torch

MIN_BYTES = 4 << 20  # smaller tensors hold too few whole huge pages


def advise_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask the system for huge pages under a fresh contiguous tensor in host memory, before it is written.

    This is advice only: nothing changes for small tensors, on other devices, or where the system has no huge pages.

    Returns:
        `tensor` itself.
    """
    if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or tensor.nbytes < MIN_BYTES:
        return tensor
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - first
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return tensor
