"""Integers that change from step to step do not choose the build of a kernel.

Triton builds a kernel again for an integer that is 1 or a multiple of 16, unless it is told not to: a prefill would
wait for the compiler whenever the number of its chunks, words or runs happens to be such a one.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from workers.kernels import triton as kernels_of_triton

CHANGING = frozenset(
    {
        "start", "length", "tiles", "stop", "room", "run_room", "column_room", "map_words", "num_words", "num_groups",
        "num_cells", "num_items", "tokens", "entries", "blocks", "splits", "table_stride", "step", "steps", "is_last",
    }
)  # fmt: skip
POINTERS = frozenset(
    {
        ("entries_kernel", "blocks"), ("entries_kernel", "entries"), ("sparse_attention_kernel", "entries"),
        ("lists_kernel", "blocks"), ("best_of_rows_kernel", "tokens"),
    }
)  # fmt: skip
FIXED = frozenset({("gather_columns_kernel", "room")})  # a multiple of 64, as rooms for columns are whole blocks


def modules() -> list[ModuleType]:
    package = kernels_of_triton.__name__
    found = pkgutil.walk_packages(kernels_of_triton.__path__, f"{package}.")
    return [importlib.import_module(one.name) for one in found]


def kernels() -> dict[str, Any]:
    return {
        name: value
        for module in modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }


def test_no_changing_integer_chooses_a_build() -> None:
    found = kernels()
    assert len(found) >= 25
    chooses = [
        (name, parameter.name)
        for name, kernel in found.items()
        for parameter in kernel.params
        if parameter.name in CHANGING and not parameter.is_constexpr and not parameter.do_not_specialize
    ]
    assert set(chooses) - POINTERS - FIXED == set()
    everything = {(name, parameter.name) for name, kernel in found.items() for parameter in kernel.params}
    assert not (POINTERS | FIXED) - everything
