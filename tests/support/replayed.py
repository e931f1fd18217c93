"""A stand-in for CUDA graphs on a CPU: records operations and kernels of Triton's interpreter, and runs them again.

Like a graph it keeps what was passed at the time of the capture: the same memory, and numbers as they were. What the
host would have to read or send in between is refused. Before a replay all memory that was taken during the capture is
filled with values that nobody wants, so that nothing can come from an earlier run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_HOST = {"_local_scalar_dense", "lift_fresh", "is_nonzero", "equal", "nonzero", "bincount", "masked_select"}
_READS = ("tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__")
_POISON = 0x5A


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


@dataclass
class Recording:
    """What one capture has seen."""

    calls: list[Callable[[], None]] = field(default_factory=list)
    made: dict[int, torch.Tensor] = field(default_factory=dict)  # memory taken meanwhile, by its address
    read: dict[int, torch.Tensor] = field(default_factory=dict)  # memory that was there before
    kernels: int = 0

    def note(self, tensors: list[torch.Tensor]) -> None:
        """Note the memory that a call gets."""
        for tensor in tensors:
            if tensor.numel() and _storage(tensor) not in self.made:
                self.read[_storage(tensor)] = tensor

    def replay(self) -> None:
        """Do it again."""
        for tensor in self.made.values():
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            whole.fill_(_POISON)
            if tensor.is_floating_point() and tensor.itemsize > 1:
                torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).fill_(math.nan)
        for call in self.calls:
            call()


class _Mode(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in _HOST:
            raise AssertionError(f"{name}: the host takes part in what is captured")
        recording, inputs = self._recording, _tensors(args, kwargs)
        recording.note(inputs)
        known = {_storage(tensor) for tensor in inputs}
        fresh = [(index, one) for index, one in enumerate(_tensors(out)) if _storage(one) not in known]
        for _, one in fresh:
            recording.made[_storage(one)] = one
        is_view = not fresh and not func._schema.is_mutable
        if name in _EMPTY or is_view:
            return out

        def again() -> None:
            found = _tensors(func(*args, **kwargs))
            for index, one in fresh:
                one.copy_(found[index])

        recording.calls.append(again)
        return out


class ReplayedOnCPU:
    """Captures work as `CudaRecorder` does; `recordings` has what was seen, in order."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.replays = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` and return its replay."""
        work()  # the warm-up
        recording = Recording()
        with _kernels_of(recording), _no_reads(), _Mode(recording):
            work()
        self.recordings.append(recording)

        def replay() -> None:
            self.replays += 1
            recording.replay()

        return replay


@contextmanager
def _kernels_of(recording: Recording) -> Iterator[None]:
    """Note kernels without running them, as a capture does."""
    launch = GridExecutor.__call__

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        recording.note(_tensors(args, kwargs))
        recording.kernels += 1
        recording.calls.append(lambda: launch(self, *args, **kwargs))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", record)
        yield


@contextmanager
def _no_reads() -> Iterator[None]:
    """Refuse what brings values to the host."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _READS:

            def refuse(self: torch.Tensor, *args: Any, _name: str = name, **kwargs: Any) -> Any:
                raise AssertionError(f"{_name}: the host reads what is captured")

            patch.setattr(torch.Tensor, name, refuse)
        yield
