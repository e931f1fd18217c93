"""Time by part: functions are found, wrapped, counted once, and put back."""

from __future__ import annotations

import importlib
import sys
import time
import types

import pytest
import torch

from workers.bench.gpu.parts import LISTS, STEP, Part, Recorder, count_launches

CPU = torch.device("cpu")


@pytest.mark.parametrize("part", [*STEP, *LISTS], ids=lambda part: part.name)
def test_the_functions_of_a_step_exist(part: Part) -> None:
    if part.module.startswith("workers.kernels.triton"):
        pytest.importorskip("triton")
    assert callable(getattr(importlib.import_module(part.module), part.name))


def test_calls_are_added_up_by_part_and_inner_ones_belong_to_the_outer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("_parts_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.inner = lambda: time.sleep(0.01)  # type: ignore[attr-defined]
    module.outer = lambda: module.inner() or 7  # type: ignore[attr-defined]
    before = module.inner
    recorder = Recorder(CPU)
    parts = tuple(Part(name, module.__name__, name) for name in ("inner", "outer", "none"))
    with recorder.recording(parts):
        assert module.outer() == 7
        module.inner()
    assert module.inner is before
    assert recorder.missing == [f"{module.__name__}.none"]
    found = recorder.seconds()
    assert found.keys() == {"inner", "outer"}
    assert 0.01 <= found["inner"] < 0.5
    assert 0.01 <= found["outer"] < 0.5
    assert recorder.seconds() == {}
    module.inner()
    assert recorder.seconds() == {}


def test_launches_are_those_of_a_gpu() -> None:
    calls: list[int] = []
    assert count_launches(lambda: calls.append(1), CPU) is None
    assert calls == [1]
