"""Neither integers that change from step to step nor where parts of tensors begin choose the build of a kernel.

Triton builds a kernel again for an integer that is 1 or a multiple of 16, and for a pointer that is no multiple of 16
bytes, unless it is told not to: a prefill would wait for the compiler whenever the number of its chunks, words or runs
happens to be such a one, or the lists of a cell begin at an odd place.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from workers.bench.builds.launches import Device
from workers.kernels import triton as kernels_of_triton
from workers.kernels.triton.blocks import QuerySides, Target
from workers.kernels.triton.entries import fill_entries
from workers.kernels.triton.layer.decode import Rows as DecodeRows
from workers.kernels.triton.layer.decode import attend_rows
from workers.kernels.triton.layer.routing import sort_entries
from workers.kernels.triton.lists import Rows
from workers.kernels.triton.merge import merge_parts
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape
from workers.kernels.triton.sparse.device_lists import make_lists
from workers.kernels.triton.sparse.selection import Kept
from workers.kernels.triton.sparse_attention import sparse_attention
from workers.kernels.triton.staging import Columns, Staged, gather_columns
from workers.kernels.triton.tiles import choose_tiles
from workers.kv.paged import LayerKV

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


def builds(call: Callable[[int], object], sizes: Iterable[int], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Return how many builds of each kernel calls of some sizes would make; nothing is compiled."""
    found: dict[str, set[str]] = {}

    def note(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = self.device_caches[90][-1]
        _, specialization, _ = binder(*arguments, debug=False, **options)
        found.setdefault(self.__name__, set()).add(str(specialization))

    monkeypatch.setattr(triton.JITFunction, "run", note)
    monkeypatch.setattr(driver, "_active", Device(90))
    for size in sizes:
        call(size)
    return {name: len(kinds) for name, kinds in found.items()}


def test_lists_that_begin_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fourteen heads, as of half of Qwen2.5-7B: those of the second of three cells begin 56 bytes after the first."""

    def select(stop: int) -> None:
        tables = CellTables.make([CellSpan(0, stop, ((0, stop, 0),))] * 3, 64, TileShape(), "cpu")
        sizes = 3, 14
        numbers = torch.zeros(sizes, dtype=torch.int32)
        words, listed = (torch.zeros(*sizes, size, dtype=torch.int32) for size in (tables.width // 32, 1001))
        offsets, columns = Kept(words, None, numbers, numbers.float()), Kept(words, listed, numbers, numbers.float())
        side = torch.zeros(2048, 64).bfloat16()
        rows, staged = Rows(stop - 256, 256), Staged(side, side, 2, 1024, stop)
        by_tile = [make_lists(offsets, columns, numbers, tables, tile) for tile in (128, 64)]
        queries, out = torch.zeros(256, 14, 64).bfloat16(), torch.zeros(256, 14, 64).bfloat16()
        target = Target(True, tl.bfloat16, torch.bfloat16, (9, 0))
        for lists in zip(*by_tile, strict=True):
            choice = choose_tiles(lists, rows, (10, 7))
            for one in lists:
                for order in torch.split(choice.order, 5):
                    entries = fill_entries(one, rows, staged, order, choice.head_tiles, choice.visited, 7)
                    there = Columns.empty(5, 1001, staged.keys)
                    gather_columns(there, one, staged, order, choice.head_tiles, 7)
                    sparse_attention(
                        QuerySides(queries, None, None), rows, staged, there, torch.ones(256), order,
                        choice.head_tiles, entries, one.tile, out, target,
                    )  # fmt: skip

    found = builds(select, (704, 768, 832, 896), monkeypatch)
    sizes = ("lists_kernel", "entries_kernel", "gather_columns_kernel", "sparse_attention_kernel")  # one for each tile
    assert found == dict.fromkeys(sizes, 2) | {"weigh_kernel": 1, "order_kernel": 1}


def decode(batch: int, splits: int) -> None:
    places, lengths = torch.ones(2, batch, dtype=torch.int32)
    rows = DecodeRows(torch.zeros(8, 4, dtype=torch.int32), places, lengths, torch.ones(batch), 64, 0, splits)
    attend_rows(torch.zeros(1, batch, 4, 64).bfloat16(), LayerKV(*torch.zeros(2, 2, 256, 64).bfloat16()), rows)


def test_rows_that_decode_beside_a_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builds(lambda batch: decode(batch, 2), range(1, 6), monkeypatch)
    assert found == {"attend_splits_kernel": 1, "merge_splits_kernel": 1}


def test_a_context_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builds(lambda splits: decode(1, splits), (1, 2, 5, 16, 99, 256), monkeypatch)
    assert found == {"attend_splits_kernel": 1, "merge_splits_kernel": 1}


def test_entries_of_steps_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def sort(tokens: int) -> None:
        sort_entries(torch.zeros(tokens, 8, dtype=torch.int64), 0, 128)

    found = builds(sort, (17, 200, 4096, 30001), monkeypatch)
    assert found == {"count_kernel": 1, "scan_kernel": 1, "place_kernel": 1}


def test_parts_of_steps_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(rows: int) -> None:
        part = torch.zeros(rows, 4, 64).bfloat16(), torch.zeros(4, rows).T  # as libraries return it
        merge_parts([part, part])

    assert builds(merge, (64, 67, 193, 8192), monkeypatch) == {"merge_parts_kernel": 1}
