"""Captures without a GPU: what is done around them. Real ones are in tests/gpu."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workers.runner.cuda_recorder import CudaRecorder

_POOL = (0, 7)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stand in for CUDA; returns what PyTorch's allocator is told."""
    said: list[Any] = []

    class Stream:
        device_index = 3

        def __init__(self, device: object = None) -> None:
            pass

        def wait_stream(self, other: object) -> None:
            pass

    @contextlib.contextmanager
    def graph(graph: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        said.append((pool, capture_error_mode))
        yield

    for name, value in (
        ("Stream", Stream), ("stream", lambda stream: contextlib.nullcontext()), ("graph", graph),
        ("current_stream", Stream), ("graph_pool_handle", lambda: _POOL),
        ("CUDAGraph", lambda: SimpleNamespace(replay=lambda: said.append("replay"))),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)

    def end(device: int, pool: object) -> None:
        said.append((device, pool))
        raise RuntimeError("not currently recording to this pool")

    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    return said


def test_work_is_warmed_up_and_then_captured(said: list[Any]) -> None:
    runs: list[int] = []
    replay = CudaRecorder(torch.device("cuda", 3)).capture(lambda: runs.append(1))
    replay()
    assert len(runs) == 3
    assert said == [(_POOL, "thread_local"), "replay"]


def test_a_capture_that_breaks_off_ends_for_the_allocator_too(said: list[Any]) -> None:
    """Else it takes all later memory for that of a capture; the error is that of the work, whatever is said then."""
    runs: list[int] = []

    def work() -> None:
        runs.append(1)
        if len(runs) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaRecorder(torch.device("cuda", 3)).capture(work)
    assert said == [(_POOL, "thread_local"), (3, _POOL)]
