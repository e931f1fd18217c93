"""Prefixes in the KV store: which blocks of a prompt are looked up, read into pages, and offered to be stored.

Decisions only: `cluster.kv_store` looks up, reads and writes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.scheduler.prefix_cache import PrefixCache
from cluster.scheduler.request import Request
from protos.stage.messages import KvBlock


@dataclass(frozen=True, slots=True)
class LookUp:
    """Keys of a waiting request's blocks, from the first on."""

    request: Request
    keys: Sequence[bytes]


@dataclass(frozen=True, slots=True)
class Load:
    """Stored blocks that belong into pages of a request, which does not run meanwhile."""

    request: Request
    blocks: tuple[KvBlock, ...]
    first: int  # index of the first of them in the prompt
    after_step: int  # steps up to this one still use these pages; 0: none does


@dataclass(frozen=True, slots=True)
class Offer:
    """A computed block of a prompt, by the hashes of its pages: it holds none of them, nor the prompt."""

    key: bytes
    parent: bytes
    start: int
    token_ids: array[int]
    hashes: tuple[bytes, ...]
    document_id: str
    pinned_len: int  # of the request
    sequence: int  # of the request
    cache_ttl_s: int = 0  # of the request

    def block(self, pages: Sequence[int]) -> KvBlock:
        """Return the block, in these pages."""
        return KvBlock(self.key, self.parent, self.start, self.token_ids, pages)


class StoredPrefixes:
    """Finds out what is stored of waiting requests, and plans what is read; see the module.

    Args:
        block_tokens: of a block; 0: there is no store, and nothing is looked up.
    """

    def __init__(self, prefixes: PrefixCache, page_size: int, block_tokens: int) -> None:
        self._prefixes = prefixes
        self._block_tokens = block_tokens
        self._pages = block_tokens // page_size  # of a block
        self._look_ups: list[LookUp] = []

    def take_look_ups(self) -> list[LookUp]:
        """Return what is to be looked up since the last call; each is answered by `found`."""
        taken, self._look_ups = self._look_ups, []
        return taken

    def must_wait(self, request: Request) -> bool:
        """Return whether it is not known yet how much of a prompt is stored; asks for it once.

        Nothing is looked up for a prompt of which as much is in memory as blocks could give.
        """
        if request.num_found is not None:
            return False
        if request.is_looked_up:
            return True
        usable = self._prefixes.usable(request, len(request.block_keys) * self._pages)
        if usable <= len(self._prefixes.match(request)):
            return False
        request.is_looked_up = True
        self._look_ups.append(LookUp(request, request.block_keys[: -(-usable // self._pages)]))
        return True

    def found(self, look_up: LookUp, blocks: int) -> None:
        """Take the answer to a look-up: the first `blocks` of its keys are stored."""
        request = look_up.request
        if request.block_keys[: len(look_up.keys)] == look_up.keys:  # else it is hashed at another length now
            request.num_found = blocks

    def to_load(self, request: Request, num_adopted: int) -> range:
        """Return the blocks to read for a request that could adopt `num_adopted` pages; empty: they add nothing.

        They begin where adopted pages may end: no block is read into a page that others read.
        """
        usable = self._prefixes.usable(request, (request.num_found or 0) * self._pages)
        if usable <= num_adopted:
            return range(0)
        first = num_adopted // self._pages
        while first and self._prefixes.usable(request, first * self._pages) != first * self._pages:
            first -= 1
        return range(first, -(-usable // self._pages))

    def pages_before(self, block: int) -> int:
        """Return how many pages lie before a block."""
        return block * self._pages

    def blocks(self, request: Request, indices: range) -> tuple[KvBlock, ...]:
        """Return blocks of an admitted request in its pages."""
        offers = [self._offer(request, index) for index in indices]
        return tuple(
            offer.block(request.pages[index * self._pages : (index + 1) * self._pages])
            for index, offer in zip(indices, offers, strict=True)
        )

    def take_complete(self, request: Request) -> list[Offer]:
        """Return the blocks of a request that are computed since the last call."""
        if not self._block_tokens or request.is_private:
            return []
        done = min(request.num_computed // self._block_tokens, len(request.block_keys))
        first, request.num_offered = request.num_offered, max(done, request.num_offered)
        return [self._offer(request, index) for index in range(first, done)]

    def _offer(self, request: Request, index: int) -> Offer:
        keys, start = request.block_keys, index * self._block_tokens
        return Offer(
            keys[index], keys[index - 1] if index else b"", start,
            array("I", request.prompt[start : start + self._block_tokens]),
            tuple(request.hashes[index * self._pages : (index + 1) * self._pages]), request.document_id,
            request.pinned_len, request.sequence, request.cache_ttl_s,
        )  # fmt: skip
