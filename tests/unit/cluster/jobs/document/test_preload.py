"""After a start, and after an import, documents are in memory before anybody asks."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.jobs.document import preload
from cluster.jobs.model import JobInput, JobRecord, JobSpec
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.kv import FakeDisk
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

BLOCK = 64


@pytest.fixture
def disk() -> FakeDisk:
    return FakeDisk()


@pytest.fixture
def bench(tmp_path: Path, disk: FakeDisk) -> Iterator[Bench]:
    bench = Bench(tmp_path / "head", disk=disk, preload=0.8)
    yield bench
    bench.close()


def text(seed: int, words: int = 200) -> bytes:
    rng = random.Random(seed)
    return " ".join(rng.choice(["stone", "river", "code", "dark", "old"]) for _ in range(words)).encode()


def add(bench: Bench, seed: int, words: int = 200, pinned: bool = False) -> str:
    """Add a document and have it read; returns its id."""
    document = bench.service.add_document(f"{seed}", [text(seed, words)], 1 << 20, pinned=pinned)
    ask(bench, document.id, "")
    backlog = bench.runtime.kv_store.backlog
    eventually(lambda: not len(backlog) and not backlog.busy)
    return document.id


def ask(bench: Bench, document_id: str, question: str = "What?") -> JobRecord:
    given = JobInput(document_id, (question,) if question else (), read=not question)
    return bench.service.wait(bench.service.submit(JobSpec(given, AnswerOptions(max_tokens=2))).id, 20)


def settle(bench: Bench) -> None:
    """Return when nothing is being loaded."""
    loader = bench.service._preload
    eventually(lambda: not loader.is_busy and not bench.runtime.kv_usage)


def starts(bench: Bench) -> set[int]:
    """Return the first positions of the blocks that were loaded."""
    return {block.start for block in bench.runtime.shard.loaded}


def test_questions_after_a_start_find_the_document_in_memory(bench: Bench, disk: FakeDisk) -> None:
    name = add(bench, 1)
    tokens = bench.service.documents.get(name).tokens
    bench.restart()
    settle(bench)
    assert starts(bench) == set(range(0, tokens // BLOCK * BLOCK, BLOCK))
    loaded = len(bench.runtime.shard.loaded)
    answer = ask(bench, name).answers[0]
    assert answer.cached_tokens >= tokens - BLOCK
    assert len(bench.runtime.shard.loaded) == loaded
    assert not bench.runtime.kv_usage


def test_an_imported_document_is_loaded(bench: Bench, tmp_path: Path) -> None:
    name = add(bench, 1)
    archive = b"".join(bench.service.export_document(name, True))
    there = Bench(tmp_path / "there", disk=FakeDisk(), preload=0.8)
    try:
        there.service.import_document([archive], 1 << 20)
        settle(there)
        loaded = len(there.runtime.shard.loaded)
        assert loaded > 1
        assert ask(there, name).answers[0].cached_tokens >= bench.service.documents.get(name).tokens - BLOCK
        assert len(there.runtime.shard.loaded) == loaded
    finally:
        there.close()


def test_without_a_share_nothing_is_loaded(tmp_path: Path, disk: FakeDisk) -> None:
    bench = Bench(tmp_path, disk=disk)
    try:
        name = add(bench, 1)
        bench.restart()
        bench.service.import_document([b"".join(bench.service.export_document(name, True))], 1 << 20)
        settle(bench)
        assert bench.runtime.shard.loaded == []
        assert ask(bench, name).answers[0].cached_tokens > BLOCK
    finally:
        bench.close()


def test_pinned_documents_come_first_then_those_used_last_as_far_as_they_fit(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(bench.service._preload), "_share", 0.2)
    names = [add(bench, seed, 2000, pinned=seed == 1) for seed in (1, 2, 3, 4, 5)]
    bench.ahead = 100.0
    ask(bench, names[1])
    records = {record.id: record for record in bench.service.documents.list()}
    room = 0.2 * bench.runtime.kv_tokens
    chosen = [record.id for record, _ in bench.service._preload._chosen("")]
    assert chosen[:2] == names[:2]
    assert len(chosen) < len(names)
    assert sum(records[name].tokens for name in chosen) <= room
    assert all(sum(records[one].tokens for one in [*chosen, name]) > room for name in names if name not in chosen)
    assert [record.id for record, _ in bench.service._preload._chosen(names[4])] == [names[4]]


def computed(bench: Bench) -> int:
    """Return how many tokens were computed since the start."""
    return sum(len(part.token_ids) for plan in bench.runtime.shard.plans for part in plan.slices)


@pytest.mark.parametrize("lost", [0, 3])
def test_what_turns_out_not_to_be_stored_is_not_computed(
    bench: Bench, disk: FakeDisk, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = add(bench, 1, 1200)
    tokens = bench.service.documents.get(name).tokens
    assert tokens > 1000
    bench.close()
    disk.forget(next(key for key, block in disk.blocks.items() if block.start == lost * BLOCK))
    with monkeypatch.context() as patch:
        patch.setattr(preload.DocumentPreload, "_share", 0.0)
        bench.open()
    bench.service._preload._stored = lambda records: {name: (tokens, 1)}  # an old listing
    bench.service._preload.add(name)
    settle(bench)
    assert starts(bench) == set(range(0, lost * BLOCK, BLOCK))
    assert computed(bench) <= 4 * BLOCK  # a step under way, and those that were sent by then
    assert ask(bench, name).answers[0].finish_reason


@pytest.mark.parametrize("is_long", [False, True])
def test_an_end_is_computed_unless_it_is_long(
    bench: Bench, disk: FakeDisk, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    name = add(bench, 1, 1200)
    tokens = bench.service.documents.get(name).tokens
    monkeypatch.setattr(preload, "MOST_COMPUTED", 300 if is_long else 1000)
    bench.close()
    for key in [key for key, block in disk.blocks.items() if block.start >= 10 * BLOCK]:
        disk.forget(key)
    bench.open()
    settle(bench)
    assert starts(bench) == set(range(0, 10 * BLOCK, BLOCK))
    assert (computed(bench) <= 4 * BLOCK) if is_long else (computed(bench) >= tokens - 10 * BLOCK > 5 * BLOCK)


def test_a_head_ends_while_it_loads(bench: Bench) -> None:
    add(bench, 1)
    bench.close()
    bench.open()
    gate = bench.runtime.shard.kv_gate = threading.Event()
    threading.Timer(0.5, gate.set).start()
    bench.restart()
    settle(bench)
    assert bench.runtime.shard.loaded


def test_a_failed_pipeline_ends_a_load_and_no_more(bench: Bench) -> None:
    name = add(bench, 1)
    bench.close()
    bench.open()
    bench.runtime.fail()
    eventually(lambda: bench.runtime.starts == 2)
    settle(bench)
    assert ask(bench, name).answers[0].finish_reason
    bench.check_idle()
