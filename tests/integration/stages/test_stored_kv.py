"""Stored KV through real stage processes: it outlives them, another layout reads it, and damage costs only time."""

from __future__ import annotations

import os
import random
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors import safe_open

from cluster.config.schema import KvStoreSection
from cluster.engine.outputs import Generation
from cluster.kv_store.store import KvStore
from tests.support.data.specs import generation_spec
from tests.support.fakes.stage import submit
from tests.support.rigs.stage_processes import Stages, eventually

BLOCK = 32
DAMAGED = 2  # of the blocks of a prompt


def make_prompt(first: int, blocks: int) -> list[int]:
    return [first, *random.Random(first).choices(range(100, 1000), k=blocks * BLOCK + 8)]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lr") as name:  # short: the path of a Unix socket
        yield Path(name)


def ask(folder: Path, count: int, prompts: Sequence[list[int]], stored: int = 0) -> tuple[list[Generation], KvStore]:
    """Ask a new pipeline of `count` stages; waits after each prompt until it has stored so many more blocks."""
    sockets = folder / f"run{len(list(folder.iterdir()))}"
    sockets.mkdir()
    made = Stages(sockets)
    made.kv_store_path = str(folder / "kv")
    store = KvStore(KvStoreSection(block_tokens=BLOCK))
    results = []
    try:
        made.spawn(count=count)
        made.load()
        made.start()
        engine = made.run_engine(store)
        for number, prompt in enumerate(prompts, 1):
            results.append(submit(engine, generation_spec(prompt, 8, ignore_eos=True)).wait(60))
            eventually(lambda number=number: store.stats.stored_blocks >= stored * number, 20)  # type: ignore[misc]
        eventually(lambda: store.max_bytes, 20)
    finally:
        made.close()
    return results, store


def test_it_outlives_the_processes_and_is_read_in_another_layout(folder: Path) -> None:
    prompt = make_prompt(5, 10)
    (first,), store = ask(folder, 2, [prompt], 10)
    assert (first.cached_tokens, store.stats.stored_blocks) == (0, 10)
    files = list((folder / "kv").rglob("*.safetensors"))
    assert len(files) == 2 * 10
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    for count in (1, 4):
        (again,), store = ask(folder, count, [prompt])
        assert (again.token_ids, again.cached_tokens) == (first.token_ids, 10 * BLOCK)
        assert store.stats.loaded_blocks == 10
        assert store.size_bytes >= sum(path.stat().st_size for path in files)


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, other: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def remove(path: Path, other: Path) -> None:
    path.unlink()


def exchange(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())


def test_damage_costs_only_time(folder: Path) -> None:
    """A block of each of four prompts is damaged in another way."""
    ways: list[Callable[[Path, Path], None]] = [truncate, flip, remove, exchange]
    prompts = [make_prompt(5 + number, 4) for number in range(len(ways))]
    first, _ = ask(folder, 1, prompts, 4)
    files = block_files(folder / "kv")
    for way, prompt in zip(ways, prompts, strict=True):
        ids = tuple(prompt[DAMAGED * BLOCK : (DAMAGED + 1) * BLOCK])
        way(files[ids], files[tuple(prompt[:BLOCK])])
    again, _ = ask(folder, 2, prompts, 1)
    healed, _ = ask(folder, 1, prompts)
    for results, cached in ((again, DAMAGED), (healed, 4)):
        assert [result.token_ids for result in results] == [result.token_ids for result in first]
        assert [result.cached_tokens for result in results] == [cached * BLOCK] * len(ways)


def block_files(store: Path) -> dict[tuple[int, ...], Path]:
    """Return the files that one shard has stored, by the tokens of the block."""
    found = {}
    for path in store.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            found[tuple(map(int, file.metadata()["token_ids"].split(",")))] = path
    return found
