"""The table of cards that the lines of a file make."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from workers.attention.cuda import plan_rows
from workers.attention.plan import AttentionPlan
from workers.bench.gpu.context import Sizes
from workers.bench.gpu.journal import Journal
from workers.bench.gpu.patterns import StatedKept
from workers.bench.gpu.tune import table_of, tiled, write_table
from workers.kernels.triton.lists import TILES, cell_lists, choose_tiles
from workers.kernels.triton.sparse.cells import CellSpan, CellTables, TileShape


def tuned(path: Path, rehearsal: bool = False) -> Path:
    journal = Journal(path, "a", rehearsal)
    facts = {"name": "A card", "commit": "abc", "torch": "2.11.0", "smi": {"driver_version": "580"}}
    journal.write("env", "card", "done", facts)
    for library, rate in (("own", 450.0), ("cudnn", 600.0), ("flash", 350.0)):
        journal.write("tune", f"dense {library}, D 128", "done", {"dim": 128, "tflops": rate, "library": library})
    journal.write("tune", "dense flash-attn, D 128", "done", {"ok": False, "why": "does not run here"})
    journal.write("tune", "tiles of 128 rows, D 128", "done", {"dim": 128, "kernel_tflops": 420.0})
    journal.write("tune", "tiles of 64 rows, D 128", "failed", {"error": "x"})
    journal.write("tune", "dense cudnn, D 64", "done", {"dim": 64, "tflops": 1.0, "library": "cudnn"})
    return path


def test_the_fastest_library_and_the_rates_of_tiles(tmp_path: Path) -> None:
    found = table_of(tuned(tmp_path / "x.jsonl"))
    assert found.keys() == {"A card"}
    assert found["A card"].keys() == {"128"}, "the own kernel was not measured with heads of 64"
    entry = found["A card"]["128"]
    assert entry["dense"] == "cudnn"
    assert entry["dense_tflops"] == {"own": 450.0, "cudnn": 600.0, "flash": 350.0}
    assert entry["tile_tflops"] == {"128": 420.0}
    assert entry["measured"]["driver"] == "580"
    assert entry["measured"]["commit"] == "abc"


def test_other_cards_stay_in_the_table(tmp_path: Path) -> None:
    table = tmp_path / "cards.json"
    table.write_text('{"Another": {"128": {"dense": "own"}}, "A card": {}}')
    assert write_table(tuned(tmp_path / "x.jsonl"), table) == "A card"
    written = json.loads(table.read_text())
    assert written["Another"] == {"128": {"dense": "own"}}
    assert written["A card"]["128"]["dense"] == "cudnn"


def test_a_rehearsal_writes_no_table(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measured on a GPU"):
        table_of(tuned(tmp_path / "x.jsonl", rehearsal=True))


def test_tiles_are_timed_on_heads_that_are_not_dense() -> None:
    """A head that is dense with either size of tiles says nothing of them: the sparse kernel has nothing to do."""
    sizes = Sizes()
    pattern, keys = tiled(sizes)
    plan = AttentionPlan(keys - sizes.cell, sizes.cell)
    span = CellSpan(plan.start, keys, ((0, keys, 0),))
    kept = StatedKept(pattern, CellTables.make([span], sizes.last_q, TileShape(), "cpu"), 1)
    words = kept.offset_words[0, 0, :, None] >> torch.arange(32)
    edges = np.flatnonzero(np.diff((words & 1).flatten().numpy(), prepend=0, append=0)).reshape(-1, 2)
    columns = kept.columns[0, 0].numpy()
    for tile in TILES:
        lists = cell_lists([edges - np.array([0, 1])], [columns], keys, tile, "cpu")
        assert choose_tiles([lists], plan_rows(plan), [1]).head_tiles.tolist() == [tile]
