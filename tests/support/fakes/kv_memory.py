"""Stored KV of real shards in memory, by layer and KV head, as a disk would have it: any layout finds its pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from protos.stage import stage_pb2 as pb
from protos.stage.messages import KvBlock, ShardSpec
from workers.kv.paged import PagedKV

Piece = tuple[torch.Tensor, ...]  # keys and values, and their scales


@dataclass
class KvMemory:
    """Pieces of blocks by key, then by (layer, head)."""

    pieces: dict[bytes, dict[tuple[int, int], Piece]] = field(default_factory=dict)
    tokens: dict[bytes, list[int]] = field(default_factory=dict)
    damaged: set[bytes] = field(default_factory=set)  # a check sum does not fit: dropped when it is read


class KvMemoryShard:
    """Mixed into a shard in this process."""

    memory: KvMemory
    shard: ShardSpec
    name = "shard"

    def __init__(self, kv: PagedKV) -> None:
        self._paged = kv

    def _own(self) -> Iterator[tuple[int, int]]:
        return ((layer, head) for layer in range(*self.shard.layers) for head in range(*self.shard.kv_heads))

    def _views(self, layer: int, head: int, pages: Sequence[int]) -> Iterator[tuple[torch.Tensor, ...]]:
        cache = self._paged.layer(layer - self.shard.layers.start)
        local, size = head - self.shard.kv_heads.start, self._paged.page_size
        parts = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
        for page in pages:
            yield tuple(part[local, page * size : (page + 1) * size] for part in parts if part is not None)

    def _has(self, key: bytes) -> bool:
        return all(piece in self.memory.pieces.get(key, {}) for piece in self._own())

    def find_kv(self, keys: Sequence[bytes]) -> int:
        return next((count for count, key in enumerate(keys) if not self._has(key)), len(keys))

    def load_kv(self, blocks: Sequence[KvBlock]) -> pb.KvCount:
        for count, block in enumerate(blocks):
            if block.key in self.memory.damaged or not self._has(block.key):
                self.memory.pieces.pop(block.key, None)
                return pb.KvCount(blocks=count, damaged=1, problem="the check sum differs")
            assert self.memory.tokens[block.key] == list(block.token_ids)
            for layer, head in self._own():
                stored = self.memory.pieces[block.key][layer, head]
                at = 0
                for views in self._views(layer, head, block.pages):
                    for view, part in zip(views, stored, strict=True):
                        view.copy_(part[at : at + self._paged.page_size])
                    at += self._paged.page_size
        return pb.KvCount(blocks=len(blocks), bytes=1000 * len(blocks))

    def store_kv(self, blocks: Sequence[KvBlock]) -> pb.KvStored:
        for block in blocks:
            pieces = self.memory.pieces.setdefault(block.key, {})
            self.memory.tokens[block.key] = list(block.token_ids)
            for layer, head in self._own():
                pages = list(self._views(layer, head, block.pages))
                pieces[layer, head] = tuple(torch.cat(parts).clone() for parts in zip(*pages, strict=True))
        return pb.KvStored(blocks=len(blocks), bytes=1000 * len(blocks))

    def list_kv(self) -> list[pb.KvEntries]:
        return [pb.KvEntries(free_bytes=1 << 40, node="memory")]

    def drop_kv(self, keys: Sequence[bytes]) -> pb.KvCount:
        return pb.KvCount(blocks=sum(self.memory.pieces.pop(key, None) is not None for key in keys))
