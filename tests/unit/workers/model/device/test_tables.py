"""Page tables in device memory: what was appended is copied, and the table used longest ago makes room."""

from __future__ import annotations

import pytest
import torch

from workers.kv.paged import PageTable
from workers.model.device.tables import DeviceTables

PAGE, CPU = 4, torch.device("cpu")


def table(*pages: int) -> PageTable:
    made = PageTable(PAGE)
    made.append(pages)
    return made


def check(there: DeviceTables, tables: list[PageTable]) -> list[int]:
    places = there.places(tables)
    assert len(set(places)) == len(tables)
    for place, one in zip(places, tables, strict=True):
        assert there.slots[place, : one.num_pages].tolist() == list(one.page_slots)
    return places


@pytest.mark.parametrize("count", [1, 2, 3, 5, 17])
def test_tables_that_grow(count: int) -> None:
    there, tables = DeviceTables(50, CPU, 17), [table(3 * one) for one in range(count)]
    kept = there.slots
    first = check(there, tables)
    for step in range(3):
        for one in tables[step % 2 :: 2]:
            one.append([20 + step] * (step + 1))
        assert check(there, tables) == first
    assert there.slots is kept


def test_only_appended_pages_are_copied() -> None:
    there, one = DeviceTables(8, CPU), table(1, 2)
    place = there.places([one])[0]
    there.slots[place, :2] = 77
    one.append([5])
    there.places([one])
    assert there.slots[place, :3].tolist() == [77, 77, 20]


def test_the_table_used_longest_ago_makes_room() -> None:
    there, (a, b, c) = DeviceTables(8, CPU, 2), (table(1), table(2), table(3))
    places = check(there, [a, b])
    check(there, [a])
    assert check(there, [c]) == [places[1]]
    assert check(there, [a]) == [places[0]]
    assert check(there, [b]) == [places[1]]
    assert check(there, [c, b]) == [places[0], places[1]]


def test_more_rows_than_places_move_the_tables() -> None:
    there, tables = DeviceTables(8, CPU, 2), [table(one) for one in range(3)]
    kept = there.slots
    check(there, tables[:2])
    check(there, tables)
    assert there.slots is not kept
    assert there.slots.shape == (4, 8)
    kept = there.slots
    there.reserve(3)
    assert there.slots is kept
    check(there, tables)


def test_a_sequence_with_new_pages_after_a_reset() -> None:
    there = DeviceTables(8, CPU)
    check(there, [table(5, 6, 7)])
    there.clear()
    check(there, [table(1, 2)])
