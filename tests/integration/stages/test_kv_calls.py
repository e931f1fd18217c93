"""Stored KV over real stage processes: computed by one layout, loaded by another, and the answer is the same."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.common.errors import StageError
from protos.stage.messages import KvBlock, SampleSpec, SamplingParams, SequenceSlice, StepPlan, StepResult
from tests.support.rigs.stage_processes import PAGE, PAGES, Stages, eventually

TOKENS = 64  # of a block
PROMPT = [(7 * i) % 4000 + 5 for i in range(4 * TOKENS + 19)]
STEPS = 6


def blocks_of(first_page: int) -> list[KvBlock]:
    blocks, parent, count = [], b"", TOKENS // PAGE
    for at in range(len(PROMPT) // TOKENS):
        ids = tuple(PROMPT[at * TOKENS : (at + 1) * TOKENS])
        key = hashlib.sha256(parent + repr(ids).encode()).digest()
        pages = tuple(range(first_page + at * count, first_page + (at + 1) * count))
        blocks.append(KvBlock(key, parent, at * TOKENS, ids, pages))
        parent = key
    return blocks


@pytest.fixture
def store() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lr") as folder:
        yield Path(folder)


@pytest.fixture
def make() -> Iterator[object]:
    """A function that starts the processes of a pipeline over a store."""
    made: list[tuple[Stages, tempfile.TemporaryDirectory[str]]] = []

    def start(count: int, store: str) -> Stages:
        folder = tempfile.TemporaryDirectory(prefix="lr")
        stages = Stages(Path(folder.name))
        made.append((stages, folder))
        stages.spawn(count=count)
        stages.load()
        stages.kv_store_path = store
        stages.start()
        return stages

    yield start
    for stages, folder in made:
        stages.close()
        folder.cleanup()


def answer(stages: Stages, first_page: int, present: int) -> list[tuple[int, float | None]]:
    """Tokens and log-probabilities after the prompt, of which `present` tokens have their KV in pages."""
    results: list[StepResult] = []
    for handle in stages.handles:
        keep = results.extend if handle.shard.is_last else lambda results: None
        handle.connect(keep, lambda reason: None)
    found: list[tuple[int, float | None]] = []
    count = -(-(len(PROMPT) + STEPS) // PAGE)
    for step in range(STEPS):
        start = present if step == 0 else len(PROMPT) + step - 1
        ids = PROMPT[present:] if step == 0 else [found[-1][0]]
        pages = range(first_page, first_page + count) if step == 0 else ()
        sample = SampleSpec(SamplingParams(logprobs=0), step)
        part = SequenceSlice(1, start, len(ids), len(PROMPT), ids, pages, count, sample)
        for handle in stages.handles:
            handle.send([StepPlan(step, (part,))])
        eventually(lambda wanted=step + 1: len(results) >= wanted, 30)  # type: ignore[misc]
        assert not results[-1].error
        (token,) = results[-1].samples
        found.append((token.token_id, token.logprob))
    return found


def assert_same(answered: list[tuple[int, float | None]], expected: list[tuple[int, float | None]]) -> None:
    """Equal tokens, and log-probabilities but for rounding: a product of fewer rows may sum in another order."""
    assert [token for token, _ in answered] == [token for token, _ in expected]
    assert [logprob for _, logprob in answered] == pytest.approx([logprob for _, logprob in expected], abs=1e-5)


def test_kv_of_two_stages_is_loaded_by_one_and_by_three(make, store: Path) -> None:
    first = make(2, str(store))
    expected = answer(first, 0, 0)
    blocks = blocks_of(0)
    keys = [block.key for block in blocks]
    for handle in first.handles:
        assert handle.find_kv(keys) == 0
        reply = handle.store_kv(blocks)
        assert (reply.blocks, reply.problem, reply.is_full) == (len(blocks), "", False)
        assert handle.find_kv([*keys, b"x" * 32]) == len(keys)
    (listed,) = first.handles[0].list_kv()
    assert sorted(entry.key for entry in listed.entries) == sorted(keys)
    assert listed.free_bytes > 0
    assert listed.node == first.handles[1].list_kv()[0].node
    files = list(first.handles[0].read_kv(keys))
    first.close()
    for count in (1, 3):
        other = make(count, str(store))
        moved = blocks_of(20)
        for handle in other.handles:
            assert handle.find_kv(keys) == len(keys)
            reply = handle.load_kv(moved)
            assert (reply.blocks, reply.damaged, reply.problem) == (len(keys), 0, "")
        assert_same(answer(other, 20, len(keys) * TOKENS), expected)
    shard = other.handles[0]
    assert shard.touch_kv([*keys, b"x" * 32]).blocks == len(keys)
    assert shard.drop_kv(keys[1:]).blocks == len(keys) - 1
    assert shard.find_kv(keys) == 1
    assert shard.write_kv(iter(files)).blocks == len(keys)
    assert shard.find_kv(keys) == len(keys)
    for damaged in (store / "v1").glob(f"*/{keys[2].hex()}/*"):
        data = bytearray(damaged.read_bytes())
        data[-1] ^= 1
        damaged.write_bytes(data)
    reply = other.handles[-1].load_kv(blocks_of(20))
    assert (reply.blocks, reply.damaged > 0) == (2, True)
    assert other.handles[-1].find_kv(keys) == 2
    with pytest.raises(StageError, match=r"INVALID_ARGUMENT"):
        shard.load_kv(blocks_of(PAGES))


def test_without_a_store_every_call_is_refused(make, store: Path) -> None:
    handle = make(1, "").handles[0]
    blocks = blocks_of(0)
    for call in (
        lambda: handle.find_kv([b"x" * 32]), lambda: handle.load_kv(blocks), lambda: handle.store_kv(blocks),
        handle.list_kv, lambda: handle.touch_kv([]), lambda: handle.drop_kv([]), lambda: list(handle.read_kv([])),
        lambda: handle.write_kv(iter(())),
    ):  # fmt: skip
        with pytest.raises(StageError, match=r"no KV store \(FAILED_PRECONDITION\)"):
            call()
    (store / "file").write_text("")
    with pytest.raises(StageError, match=r"kv_store.path: .*file: cannot be used .*kv_store.enabled: false"):
        make(1, str(store / "file"))
