"""Stored KV through real stage processes: it outlives them, another layout reads it, and damage costs only time."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config.schema import KvStoreSection
from cluster.engine.outputs import Generation
from cluster.kv_store.store import KvStore
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import submit
from tests.support.rigs.stage_processes import Stages, eventually

BLOCK = 32
PROMPT = [5 + (7 * n) % 900 for n in range(10 * BLOCK + 9)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lr") as name:  # short: the path of a Unix socket
        yield Path(name)


def ask(folder: Path, count: int, wait_for: int = 0) -> tuple[Generation, KvStore]:
    """Ask a new pipeline of `count` stages; waits until so many blocks are stored."""
    sockets = folder / f"run{len(list(folder.iterdir()))}"
    sockets.mkdir()
    made = Stages(sockets)
    made.kv_store_path = str(folder / "kv")
    store = KvStore(KvStoreSection(block_tokens=BLOCK))
    try:
        made.spawn(count=count)
        made.load()
        made.start()
        engine = made.run_engine(store)
        result = submit(engine, generation_spec(PROMPT, 8, ignore_eos=True)).wait(60)
        eventually(lambda: store.stats.stored_blocks >= wait_for, 20)
        eventually(lambda: store.max_bytes, 20)
    finally:
        made.close()
    return result, store


def test_it_outlives_the_processes_and_is_read_in_another_layout(folder: Path) -> None:
    first, store = ask(folder, 2, 10)
    assert (first.cached_tokens, store.stats.stored_blocks) == (0, 10)
    files = list((folder / "kv").rglob("*.safetensors"))
    assert len(files) == 2 * 10
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    for count in (1, 2, 4):
        again, store = ask(folder, count)
        assert (again.token_ids, again.cached_tokens) == (first.token_ids, 10 * BLOCK)
        assert store.stats.loaded_blocks == 10
        assert store.size_bytes >= sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "removed", "foreign"])
def test_damage_costs_only_time(folder: Path, kind: str) -> None:
    first, _ = ask(folder, 1, 10)
    files = sorted((folder / "kv").rglob("*.safetensors"))
    damaged = files[3]
    data = bytearray(damaged.read_bytes())
    if kind == "removed":
        damaged.unlink()
    elif kind == "foreign":
        damaged.write_bytes(files[4].read_bytes())
    elif kind == "truncated":
        os.truncate(damaged, len(data) // 2)
    else:
        data[-100] ^= 1
        damaged.write_bytes(data)
    again, _ = ask(folder, 2, 1)
    assert again.token_ids == first.token_ids
    assert again.cached_tokens < 10 * BLOCK
    assert again.cached_tokens % BLOCK == 0
    healed, _ = ask(folder, 1)
    assert (healed.token_ids, healed.cached_tokens) == (first.token_ids, 10 * BLOCK)
