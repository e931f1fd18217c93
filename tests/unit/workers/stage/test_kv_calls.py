"""The calls about stored KV, without a connection."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent import futures
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import grpc
import pytest
import torch

from protos.stage import codec
from protos.stage import stage_pb2 as pb
from protos.stage.messages import KvBlock
from tests.support.rigs.kv_shard import PAGES, WHOLE, Shard, block_of, file_of
from workers.stage.kv_calls import MAX_CALLS, KvCalls


class Refused(Exception):
    """What `abort` raises."""


class Call:
    """The context of a call that ends with the `with` block."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[], None]] = []

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self._callbacks.append(callback)
        return True

    def is_active(self) -> bool:
        return True

    def abort(self, code: grpc.StatusCode, message: str) -> NoReturn:
        raise Refused(f"{code.name}: {message}")


def served(shard: Shard) -> KvCalls:
    calls = KvCalls(2)
    calls.open_store(shard.store, shard.pages)
    return calls


def some_blocks(first: int = 0) -> list[KvBlock]:
    return [replace(block_of(first=first + 4 * at, scattered=False), key=bytes([at]) * 32) for at in range(5)]


def message(blocks: list[KvBlock]) -> pb.KvBlocks:
    return pb.KvBlocks(blocks=map(codec.encode, blocks))


def test_blocks_go_to_the_store_and_back(tmp_path: Path) -> None:
    here, there = Shard(tmp_path / "a"), Shard(tmp_path / "b", seed=2)
    blocks, moved = some_blocks(), some_blocks(40)
    keys = pb.KvKeys(keys=[block.key for block in blocks])
    first, second = served(here), served(there)
    with Call() as call:
        stored = first.StoreKv(message(blocks), call)
        assert (stored.blocks, stored.problem, stored.is_full) == (5, "", False)
        assert first.FindKv(keys, call).blocks == 5
        assert first.TouchKv(pb.KvKeys(keys=[*keys.keys[:2], b"x" * 32]), call).blocks == 2
        (listed,) = first.ListKv(pb.KvListRequest(), call)
        assert {entry.key for entry in listed.entries} == set(keys.keys)
        assert sum(entry.bytes for entry in listed.entries) == stored.bytes
        files = list(first.ReadKv(keys, call))
        bad = [pb.KvFile(key=b"x" * 32, name=WHOLE.name, data=b"x"), pb.KvFile(data=b"y", is_last=True)]
        written = second.WriteKv(iter([*bad, *files]), call)
        assert (written.blocks, written.damaged, written.bytes) == (5, 1, stored.bytes)
        loaded = second.LoadKv(message(moved), call)
        assert (loaded.blocks, loaded.damaged, loaded.problem) == (5, 0, "")
        for block, other in zip(blocks, moved, strict=True):
            found = there.content(other)
            assert all(torch.equal(tensor, found[at]) for at, tensor in here.content(block).items())
        assert second.DropKv(keys, call).blocks == 5
        assert second.FindKv(keys, call).blocks == 0


def test_loading_stops_at_a_bad_block(tmp_path: Path) -> None:
    shard = Shard(tmp_path)
    calls, blocks = served(shard), some_blocks()
    with Call() as call:
        calls.StoreKv(message(blocks), call)
        path = file_of(tmp_path, key=blocks[2].key)
        path.write_bytes(path.read_bytes()[:-1])
        reply = calls.LoadKv(message(blocks), call)
        assert (reply.blocks, reply.damaged) == (2, 1)
        assert "bytes: must be" in reply.problem
        assert not path.exists()


@pytest.mark.parametrize(
    "blocks",
    [
        [replace(block_of(), pages=(0, 1, 2, PAGES))], [replace(block_of(), pages=(0, 1, 2))],
        [replace(block_of(), key=b"short")], [replace(block_of(), parent=b"short")], [block_of(), block_of()],
    ],
    ids=["outside", "not filled", "key", "parent", "twice"],
)  # fmt: skip
def test_what_is_no_block_is_refused(tmp_path: Path, blocks: list[KvBlock]) -> None:
    calls = served(Shard(tmp_path))
    for refuse in (calls.LoadKv, calls.StoreKv):
        with Call() as call, pytest.raises(Refused, match="INVALID_ARGUMENT: blocks: "):
            refuse(message(blocks), call)


def test_calls_are_limited_and_end_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, answer, begun = Shard(tmp_path), threading.Event(), threading.Semaphore(0)
    calls, keys = served(shard), pb.KvKeys()

    def find() -> None:
        with Call() as call:
            calls.FindKv(keys, call)

    monkeypatch.setattr(shard.store, "find", lambda keys: (begun.release(), answer.wait(20), 0)[2])
    with futures.ThreadPoolExecutor(MAX_CALLS) as threads:
        running = [threads.submit(find) for _ in range(MAX_CALLS)]
        for _ in running:
            assert begun.acquire(timeout=20)
        with Call() as call, pytest.raises(Refused, match="RESOURCE_EXHAUSTED"):
            calls.FindKv(keys, call)
        answer.set()
    find()
    with Call() as call, pytest.raises(Refused, match="INVALID_ARGUMENT"):
        calls.FindKv(pb.KvKeys(keys=[b"short"]), call)
    listings = [calls.ListKv(pb.KvListRequest(), call) for _ in range(2 * MAX_CALLS)]
    for listing in listings:
        next(listing)
        listing.close()  # type: ignore[attr-defined]
    calls.close_store()
    with Call() as call, pytest.raises(Refused, match="FAILED_PRECONDITION: no KV store"):
        calls.FindKv(keys, call)


def test_a_call_that_the_disk_holds_counts_after_its_client_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, answer, begun = Shard(tmp_path), threading.Event(), threading.Semaphore(0)
    calls, keys = served(shard), pb.KvKeys()
    monkeypatch.setattr(shard.store, "find", lambda keys: (begun.release(), answer.wait(20), 0)[2])
    with futures.ThreadPoolExecutor(MAX_CALLS) as threads, Call() as given_up:
        for _ in range(MAX_CALLS):
            threads.submit(calls.FindKv, keys, given_up)
            assert begun.acquire(timeout=20)
        given_up.end()
        try:
            with Call() as call, pytest.raises(Refused, match="RESOURCE_EXHAUSTED"):
                calls.FindKv(keys, call)
        finally:
            answer.set()
