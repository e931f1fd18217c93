"""The inputs of steps that decode, at fixed places in device memory, as captured graphs read them.

They are written on the host and copied at once. Page tables are those of `DeviceTables`.

Legend: `B` rows of a graph, of which the last may be idle: they see no key and keep none of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from protos.model.spec import ModelSpec
from protos.stage.messages import SequenceSlice
from workers.kv.paged import PagedKV, PlanMismatch
from workers.model.batch import PageTables
from workers.model.device.tables import DeviceTables
from workers.model.rope import row_scales

if TYPE_CHECKING:
    from workers.kernels.triton.layer.decode import Rows


class _Fields(NamedTuple):
    """Views of `[6, rows]` int32."""

    tokens: torch.Tensor
    positions: torch.Tensor
    lengths: torch.Tensor  # keys that a row sees, its own included; 0 for idle rows
    slots: torch.Tensor  # of the row's own key; -1 for idle rows
    places: torch.Tensor  # of its page table
    scales: torch.Tensor  # float32

    @staticmethod
    def of(whole: torch.Tensor) -> _Fields:
        tokens, positions, lengths, slots, places, scales = whole
        return _Fields(tokens, positions, lengths, slots, places, scales.view(torch.float32))


class DecodeInputs:
    """Tokens, positions, slots and so on of steps with at most `capacity` rows."""

    def __init__(
        self, spec: ModelSpec, kv: PagedKV, tables: DeviceTables, capacity: int, device: torch.device
    ) -> None:  # fmt: skip
        """Args: `tables` gets as many places as there are rows."""
        tables.reserve(capacity)
        self.capacity = capacity
        self._spec, self._kv, self._tables = spec, kv, tables
        self._slots = tables.slots  # as they lie in memory while graphs are captured
        on_gpu = device.type == "cuda"
        room = -(-capacity // 4) * 4  # so that Triton finds every field aligned
        self._host = torch.zeros(len(_Fields._fields), room, dtype=torch.int32, pin_memory=on_gpu)
        self._there = torch.zeros_like(self._host, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._known = _Fields.of(self._there)
        self._rest(0)
        self.upload()

    @property
    def is_in_place(self) -> bool:
        """Whether page tables still lie where graphs read them: a step with too many rows moves them."""
        return self._tables.slots is self._slots

    def fill(self, parts: Sequence[SequenceSlice], tables: PageTables) -> int:
        """Note the rows of a step, one for each of `parts`, except for their tokens; the rows after them are idle.

        Args:
            tables: to which the plan was applied.

        Returns:
            The number of keys that the longest row sees.

        Raises:
            PlanMismatch: a position lies beyond its table, or a slot outside the cache.
        """
        page, count = self._kv.page_size, len(parts)
        size = self._kv.num_pages * page
        slots = []
        for part in parts:
            table = tables[part.sequence]
            if part.start >= table.num_pages * page:
                raise PlanMismatch(f"position {part.start} lies beyond the {table.num_pages} pages of the table")
            slots.append(table.page_slots[part.start // page] + part.start % page)
            if not 0 <= slots[-1] < size:
                raise PlanMismatch(f"slot {slots[-1]} of a plan lies outside the cache of {size} slots")
        if self._copied is not None:
            self._copied.synchronize()  # what was filled in before has been read
        host, starts = _Fields.of(self._host), torch.tensor([part.start for part in parts])
        host.positions[:count] = starts
        host.lengths[:count] = starts + 1
        host.slots[:count] = torch.tensor(slots)
        host.places[:count] = torch.tensor(self._tables.places([tables[part.sequence] for part in parts]))
        scale_lens = torch.tensor([part.scale_len or part.prompt_len for part in parts])
        host.scales[:count] = row_scales(starts, scale_lens, self._spec.head_dim, self._spec.dual_chunk)
        self._rest(count)
        return int(starts.max()) + 1

    def upload(self, tokens: Sequence[int] = ()) -> None:
        """Copy everything to the device, with the input tokens at the first stage."""
        self._host[0, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self._there.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record()

    def tokens(self, rows: int) -> torch.Tensor:
        """Return `[B]` int32 on the device."""
        return self._known.tokens[:rows]

    def positions(self, rows: int) -> torch.Tensor:
        """Return `[B]` int32 on the device."""
        return self._known.positions[:rows]

    def slots(self, rows: int) -> torch.Tensor:
        """Return `[B]` int32 on the device."""
        return self._known.slots[:rows]

    def rows(self, rows: int, splits: int) -> Rows:
        """Return the rows as decode attention takes them, their keys cut into so many splits."""
        from workers.kernels.triton.layer.decode import Rows

        known = self._known
        return Rows(
            self._slots, known.places[:rows], known.lengths[:rows], known.scales[:rows], self._kv.page_size,
            self._spec.chunk_distance, splits,
        )  # fmt: skip

    def _rest(self, count: int) -> None:
        """Make rows from `count` on idle."""
        self._host[:, count:] = 0
        _Fields.of(self._host).slots[count:] = -1
