"""Page tables of sequences in device memory, where only the pages that were appended since the last step are copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from workers.kv.paged import PageTable


@dataclass(slots=True)
class _Place:
    row: int
    pages: int = 0  # of the table, in device memory by now


class DeviceTables:
    """Tables `[N, pages]` of the sequences that decode; a new one takes the place of the one that was used longest ago.

    So nobody needs to say that a sequence has ended. `slots` stays where it is in memory, as long as a step has no more
    rows than there are places.
    """

    def __init__(self, pages: int, device: torch.device, places: int = 16) -> None:
        """Args: `pages` is the number of pages of the cache, the most that a table has."""
        self.slots = torch.zeros(places, pages, dtype=torch.int32, device=device)  # the first slot of every page
        self._places: dict[PageTable, _Place] = {}  # in order of use

    def clear(self) -> None:
        """Forget all tables."""
        self._places.clear()

    def reserve(self, places: int) -> None:
        """Have places for steps of so many rows; all tables are forgotten if there were fewer."""
        if places > len(self.slots):
            self.clear()
            self.slots = self.slots.new_zeros(places, self.slots.shape[1])

    def places(self, tables: Sequence[PageTable]) -> list[int]:
        """Return the rows of `slots` that hold the tables of a step, which are different ones."""
        if len(tables) > len(self.slots):
            self.reserve(1 << (len(tables) - 1).bit_length())
        return [self._place(table) for table in tables]

    def _place(self, table: PageTable) -> int:
        place = self._places.pop(table, None) or _Place(self._free_row())
        if place.pages < table.num_pages:
            appended = np.frombuffer(table.page_slots[place.pages :], np.int32)
            self.slots[place.row, place.pages : table.num_pages].copy_(torch.from_numpy(appended), non_blocking=True)
            place.pages = table.num_pages
        self._places[table] = place  # the one used last
        return place.row

    def _free_row(self) -> int:
        if len(self._places) < len(self.slots):
            return len(self._places)
        return self._places.pop(next(iter(self._places))).row
