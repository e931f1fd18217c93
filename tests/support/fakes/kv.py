"""The part of a shard that stores KV, in memory: a disk that several shards share, and what may go wrong with it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from cluster.common.errors import StageError
from protos.stage import stage_pb2 as pb
from protos.stage.messages import KvBlock


@dataclass
class FakeDisk:
    """Blocks by key, each with the shards that have written it."""

    node: str = "node"
    block_bytes: int = 100  # that one shard writes
    free_bytes: int = 1 << 40
    blocks: dict[bytes, KvBlock] = field(default_factory=dict)
    written: dict[bytes, set[tuple[int, int]]] = field(default_factory=dict)
    used: dict[bytes, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.time
    is_full: bool = False
    is_read_only: bool = False
    file_padding: int = 0  # bytes of files beside what they say
    dropped: list[bytes] = field(default_factory=list)
    on_write: Callable[[bytes], None] = lambda key: None

    def keys_of(self, shard: tuple[int, int]) -> set[bytes]:
        return {key for key, shards in self.written.items() if shard in shards}

    def forget(self, key: bytes) -> None:
        """Lose a block, as another head that shares the folder may drop it."""
        self.written.pop(key, None)


class FakeKvShard:
    """Mixed into a fake shard; `disk` is None without a store."""

    disk: FakeDisk | None = None
    broken_kv = False  # whether it answers nothing about KV
    kv_gate: threading.Event | None = None  # loads and writes wait for it
    name: str

    def __init__(self) -> None:
        self.kv_calls: list[str] = []
        self.loaded: list[KvBlock] = []

    def _use(self, call: str) -> tuple[FakeDisk, tuple[int, int]]:
        self.kv_calls.append(call)
        if call in ("load", "store") and self.kv_gate is not None:
            assert self.kv_gate.wait(20)
        if self.disk is None or self.broken_kv:
            raise StageError(f"{self.name}: no answer")
        return self.disk, (self.shard.stage, self.shard.rank)  # type: ignore[attr-defined]

    def find_kv(self, keys: Sequence[bytes]) -> int:
        disk, me = self._use("find")
        return next((n for n, key in enumerate(keys) if me not in disk.written.get(key, ())), len(keys))

    def touch_kv(self, keys: Sequence[bytes]) -> pb.KvCount:
        disk, _ = self._use("touch")
        there = [key for key in keys if key in disk.written]
        disk.used.update(dict.fromkeys(there, disk.clock()))
        return pb.KvCount(blocks=len(there))

    def load_kv(self, blocks: Sequence[KvBlock]) -> pb.KvCount:
        disk, me = self._use("load")
        pages = [page for block in blocks for page in block.pages]
        assert len(set(pages)) == len(pages), "a page comes twice"
        count = 0
        for block in blocks:
            if me not in disk.written.get(block.key, ()):
                return pb.KvCount(blocks=count, problem="a block is gone", bytes=count * disk.block_bytes)
            stored = disk.blocks[block.key]
            assert (block.parent, block.start) == (stored.parent, stored.start)
            assert list(block.token_ids) == list(stored.token_ids), "it is another block"
            self.loaded.append(block)
            disk.used[block.key] = disk.clock()
            count += 1
        return pb.KvCount(blocks=count, bytes=count * disk.block_bytes)

    def store_kv(self, blocks: Sequence[KvBlock]) -> pb.KvStored:
        disk, me = self._use("store")
        pages = [page for block in blocks for page in block.pages]
        assert len(set(pages)) == len(pages), "a page comes twice"
        if disk.is_full:
            return pb.KvStored(is_full=True, problem="No space left on device")
        for block in blocks:
            disk.on_write(block.key)
            disk.blocks[block.key] = block
            disk.written.setdefault(block.key, set()).add(me)
            disk.used[block.key] = disk.clock()
        return pb.KvStored(blocks=len(blocks), bytes=len(blocks) * disk.block_bytes)

    def list_kv(self) -> list[pb.KvEntries]:
        disk, _ = self._use("list")
        entries = [
            pb.KvEntry(
                key=key, parent=disk.blocks[key].parent, start=disk.blocks[key].start,
                bytes=len(shards) * disk.block_bytes, used=disk.used.get(key, disk.clock()),
            )
            for key, shards in disk.written.items()
        ]  # fmt: skip
        return [pb.KvEntries(entries=entries, free_bytes=disk.free_bytes, node=disk.node)]

    def drop_kv(self, keys: Sequence[bytes]) -> pb.KvCount:
        disk, _ = self._use("drop")
        if disk.is_read_only:
            return pb.KvCount(problem="Read-only file system")
        there = [key for key in keys if disk.written.pop(key, None)]
        disk.dropped += there
        return pb.KvCount(blocks=len(there))

    def read_kv(self, keys: Sequence[bytes]) -> Iterator[pb.KvFile]:
        """Yield a file a shard, which says what its block is, in two pieces."""
        disk, _ = self._use("read")
        for key in keys:
            for stage, rank in sorted(disk.written.get(key, ())):
                block = disk.blocks[key]
                values = [key.hex(), block.parent.hex(), block.start, list(block.token_ids), "x" * disk.file_padding]
                data = json.dumps(values).encode()
                yield pb.KvFile(key=key, name=f"l{stage}-{stage + 1}_h{rank}-{rank + 1}.safetensors", data=data[:50])
                yield pb.KvFile(data=data[50:], is_last=True)

    def write_kv(self, files: Iterator[pb.KvFile]) -> pb.KvCount:
        disk, _ = self._use("write")
        data, keys = b"", set()
        for piece in files:
            keys |= {piece.key} - {b""}
            data += piece.data
        (key,) = keys
        if disk.is_full:
            return pb.KvCount(problem="No space left on device")
        try:
            key_text, parent, start, ids, _ = json.loads(data)
            block = KvBlock(bytes.fromhex(key_text), bytes.fromhex(parent), start, ids, ())
        except (ValueError, TypeError):
            return pb.KvCount(damaged=1, problem="a checksum is wrong")
        if block.key != key:
            return pb.KvCount(damaged=1, problem="the key is that of another block")
        disk.blocks[key] = block
        disk.written.setdefault(key, set()).add((0, 0))
        return pb.KvCount(blocks=1, bytes=len(data))
