"""Capturing the work of a GPU as CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch

_WARM_UPS = 2  # runs before a capture, in which kernels are compiled and loaded and libraries take their workspaces


class CudaRecorder:
    """Captures one graph after the other; all take their temporary memory from one pool.

    So only one of them may run at a time, and what a graph leaves in that memory is lost when another one runs: results
    belong in memory that was taken before. Graphs run on the stream that is current when they are replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # warm-up and capture on one stream, which has the workspaces
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` and capture it; returns the replay. No random numbers are drawn in it.

        Raises:
            RuntimeError: it waits for the device or copies from memory of the host that is not pinned.
        """
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(current):  # which is current again even where a capture fails half-way
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads may call CUDA meanwhile: those of links and of stored KV
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    work()
            except RuntimeError:
                # A capture that CUDA has broken off goes on for PyTorch's allocator: it would never again give cached
                # memory back when memory is short.
                with contextlib.suppress(RuntimeError):  # this one was ended
                    torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
                raise
        return graph.replay
