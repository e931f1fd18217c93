"""The KV store as the head sees it: what is looked up, read, written, kept and dropped.

One object for the life of a head. A pipeline is attached while it runs; without one, only what is known in memory can
be asked. The files themselves are the business of the shards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from cluster.config.schema import KvStoreSection
from cluster.kv_store.backlog import Backlog
from cluster.kv_store.claims import KeyClaims
from cluster.kv_store.engine_calls import EngineCalls
from cluster.kv_store.index import KvIndex
from cluster.kv_store.reader import BATCH, KvReader
from cluster.kv_store.shard_calls import Loaded, ShardCalls
from cluster.kv_store.stats import KvStats
from cluster.kv_store.upkeep import KvUpkeep
from cluster.kv_store.writer import PAUSE_S, KvWriter
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.stored_prefix import Offer
from protos.stage.messages import KvBlock

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle

_SHARE_OF_DISK = 0.1  # of what is free at the start and what the store has already
_FLUSH_S = 10.0  # at the end of a pipeline, for blocks that are not written yet
_CALLS_END_S = 5.0
_WRITER_ENDS_S = 1.0  # after its last call
_log = logging.getLogger(__name__)


class KvEvents(Protocol):
    """Who keeps account of the KV of documents; called on threads of the store."""

    def before_store(self, document_id: str, pinned_len: int, keys: Sequence[bytes]) -> bool:
        """Blocks of a prompt are about to be stored, or are already; `pinned_len` decides about its length scale.

        Returns whether the document is there and this is noted for good: else they are not stored.
        """

    def on_dropped(self, keys: Sequence[bytes]) -> None:
        """Blocks are not stored any more; none of them is stored again until this returns."""

    def retained(self) -> Set[bytes]:
        """Return the blocks to keep whatever their age and the quota: those of pinned documents."""


class KvStore:
    """Policy over the stored KV of a deployment. Any thread may call it, unless a method says otherwise."""

    def __init__(
        self, settings: KvStoreSection, is_enabled: bool | None = None, clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """
        Args:
            is_enabled: instead of `settings.enabled`.
            clock: seconds since 1970, to be compared with times of files.
        """
        self.is_enabled = settings.enabled if is_enabled is None else is_enabled
        self.block_tokens = settings.block_tokens if self.is_enabled else 0
        self.now = clock
        self.events: KvEvents | None = None
        self.index = KvIndex(clock)
        self.stats = KvStats()
        self.backlog = Backlog()
        self.claims = KeyClaims()  # of the pipeline
        self.settings = settings
        self.limits: dict[str, int] = {}  # bytes, by node
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._forgotten: set[bytes] = set()  # that are to be dropped
        self._told: dict[bytes, set[str]] = {}  # key -> documents that are known to have it
        self.is_full = False  # the last write found no room on the disk: storing pauses
        self.mute_until = 0.0  # no look-ups before, in seconds of the monotonic clock: a disk does not answer
        self._full_until = 0.0
        self._calls: ShardCalls | None = None
        self._engine: EngineCalls | None = None
        self._pool: PagePool | None = None
        self._reader: KvReader | None = None
        self._writer: KvWriter | None = None
        self._upkeep: KvUpkeep | None = None

    # --- a pipeline --------------------------------------------------------------------------------------------------

    def attach(
        self, shards: Sequence[GrpcStageHandle], post: Callable[[Callable[[], None]], None], pool: PagePool
    ) -> None:
        """Begin to read and write for a pipeline.

        Args:
            post: queues a function for the thread of its engine, to which `pool` belongs.
        """
        if not self.is_enabled:
            return
        self.backlog, self.claims = Backlog(), KeyClaims()
        self._calls, self._engine, self._pool = ShardCalls(shards), EngineCalls(post), pool
        self._reader = KvReader(self, self._calls, post)
        self._writer = KvWriter(self, self._calls, self._engine, pool)
        self._upkeep = KvUpkeep(self, self._calls, self._engine, pool)
        self._writer.start()
        self._upkeep.start()

    def detach(self, flush_s: float = _FLUSH_S, within_s: float = _CALLS_END_S, replaced: Collection[int] = ()) -> bool:
        """Write what is left, for a moment, and leave the pipeline; may be called twice.

        Args:
            flush_s: 0 when its engine or a shard does not work any more.
            within_s: to wait for calls under way.
            replaced: stages whose processes are not used any more.

        Returns:
            Whether no shard is at work for the store: only then may the pages be used by another pipeline.
        """
        calls, engine, reader, writer, upkeep = self._calls, self._engine, self._reader, self._writer, self._upkeep
        if calls is None or engine is None or reader is None or writer is None or upkeep is None:
            return True
        if flush_s and not self.is_full:
            self.backlog.wait_empty(flush_s)
        self._calls = self._engine = self._pool = self._writer = self._upkeep = None  # the reader answers: nothing
        for part in (upkeep, reader, engine, writer):
            part.close()
        are_over = calls.close(within_s, replaced)
        writer.join(_WRITER_ENDS_S)
        return are_over

    def refill(self, pool: PagePool, shards: Sequence[GrpcStageHandle]) -> int:
        """Load what a pool still has into shards that have lost it; returns how many pages keep their content.

        The pool is at rest and no pipeline attached; every other shard has its part of all pages. Whatever cannot be
        loaded is found by nobody any more, as are pages of no stored block.

        Raises:
            ShardLost: a shard does not answer.
        """
        blocks, kept, at = pool.stored_blocks(), set[int](), 0
        calls = ShardCalls(shards)
        try:
            while at < len(blocks):
                batch = _apart(blocks[at : at + BATCH])
                began = self._monotonic()
                loaded = calls.load(batch)
                self.note_loaded(batch, loaded, self._monotonic() - began)
                kept.update(page for block in batch[: loaded.blocks] for page in block.pages)
                at += loaded.blocks + (loaded.blocks < len(batch))  # the one that failed is left out
        finally:
            calls.close(0)
        pool.unpublish([page for page in pool.published() if page not in kept])
        return len(kept)

    # --- of the engine (its thread) ----------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes], on_found: Callable[[int], None]) -> None:
        """Ask how many of the first blocks are stored; `on_found` is called on the engine's thread."""
        assert self._reader is not None
        self._reader.find(keys, on_found)

    def load(
        self, blocks: Sequence[KvBlock], is_wanted: Callable[[], bool], on_loaded: Callable[[int], None],
        on_lost: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Read blocks into their pages, see `KvReader.load`; answers on the engine's thread."""
        assert self._reader is not None
        self._reader.load(blocks, is_wanted, on_loaded, on_lost)

    def offer(self, offers: Sequence[Offer]) -> None:
        """Queue computed blocks to be stored, and tell whose document has them; never waits."""
        now = self.now()
        self.index.touch([offer.key for offer in offers], now)
        self.index.protect({offer.key: now + offer.cache_ttl_s for offer in offers if offer.cache_ttl_s})
        wanted = []
        for offer in offers:
            if not self.index.has(offer.key):
                wanted.append(offer)
                continue
            self._mark(offer)
            if offer.document_id and offer.document_id not in self._told.get(offer.key, ()):
                wanted.append(offer)
        if wanted and (dropped := self.backlog.put(wanted)):
            self.stats.add(not_stored_blocks=dropped)

    def _mark(self, offer: Offer) -> None:
        """Note that the store has what is in the pages of a block."""
        if (pool := self._pool) is not None and not pool.is_stored(offer.key):
            pages = pool.match(offer.hashes)
            if len(pages) == len(offer.hashes):
                pool.mark_stored(offer.block(pages))

    # --- of documents ------------------------------------------------------------------------------------------------

    def stored_prefix(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """Return how many blocks from the first on are stored, and the bytes of all these on all nodes.

        The keys may be in any order, such as all of a document; then the longest of its prompts counts.
        """
        return self.index.prefix(keys)

    def chained(self, keys: Iterable[bytes]) -> list[tuple[bytes, bytes, int]]:
        """Return (key, parent, start) of those of these blocks that can be used, parents before their children."""
        return self.index.chained(keys)

    def note_imported(self, key: bytes, parent: bytes, start: int, size: int) -> bool:
        """Note a block whose files, of `size` bytes, were put on every node; returns False if it has no room there."""
        self.index.add(key, parent, start, dict.fromkeys(self.index.node_bytes, size), self.now())
        return self.make_room() and self.index.has(key)  # it may itself have had to go

    def refresh(self) -> None:
        """Read again what every node has, after somebody has put blocks there."""
        if (upkeep := self._upkeep) is not None:
            upkeep.read_listing()

    def node_shards(self) -> list[GrpcStageHandle]:
        """Return one shard of every node, which reads and writes the files there; none while no node is known."""
        return upkeep.node_shards() if (upkeep := self._upkeep) is not None else []

    def forget_document(self, keys: Iterable[bytes]) -> None:
        """Drop blocks, on disk and in memory: now, or as soon as a pipeline runs and its nodes are known."""
        if not self.is_enabled:
            return
        wanted = set(keys)
        self.backlog.discard(wanted)
        self.forget_later(wanted)
        if (upkeep := self._upkeep) is not None:
            upkeep.drop_forgotten()

    # --- of reader, writer and upkeep ---------------------------------------------------------------------------------

    def note_found(self, keys: Sequence[bytes], found: int, began: float) -> None:
        """Note the answer to a look-up, which began at a time as of `now`."""
        self.stats.add(found_blocks=found)
        self.index.touch(keys[:found], self.now())
        if found < len(keys):
            self.index.doubt(keys[found], began)

    def note_loaded(self, blocks: Sequence[KvBlock], loaded: Loaded, seconds: float) -> None:
        self.stats.add(
            loaded_blocks=loaded.blocks, loaded_bytes=loaded.bytes, load_s=seconds, damaged_blocks=loaded.damaged
        )
        self.index.touch((block.key for block in blocks[: loaded.blocks]), self.now(), is_saved=True)
        if loaded.blocks < len(blocks):
            self.index.doubt(blocks[loaded.blocks].key, self.now())
            _log.warning("stored KV: a block could not be read and is computed: %s", loaded.problem or "it is gone")

    def note_stored(self, blocks: Sequence[KvBlock], sizes: Sequence[int], seconds: float) -> None:
        """Note blocks that were written; `sizes` are the new bytes of all of them, by shard."""
        nodes = upkeep.by_node(sizes) if (upkeep := self._upkeep) is not None else {}
        each = {node: size // max(1, len(blocks)) for node, size in nodes.items()}
        for block in blocks:
            self.index.add(block.key, block.parent, block.start, each, self.now())
        self.stats.add(stored_blocks=len(blocks), stored_bytes=sum(sizes), store_s=seconds)
        self.is_full = self.is_full and not blocks

    def end_write(self) -> None:
        """Drop what was forgotten while it was written."""
        if (upkeep := self._upkeep) is not None:
            upkeep.drop_forgotten()

    def account(self, offers: Sequence[Offer]) -> list[Offer]:
        """Note whose blocks are about to be stored; returns the first of them that may be."""
        allowed: list[Offer] = []
        for (name, pinned_len), group in groupby(offers, lambda offer: (offer.document_id, offer.pinned_len)):
            blocks = list(group)
            new = [offer.key for offer in blocks if name not in self._told.get(offer.key, ())] if name else []
            if new and self.events is not None:
                if not self.events.before_store(name, pinned_len, new):
                    break
                for key in new:
                    self._told.setdefault(key, set()).add(name)
            allowed += blocks
        return allowed

    def retained_keys(self) -> Set[bytes]:
        """Return the blocks that neither age nor quota drops, fast to look up."""
        return self.events.retained() if self.events is not None else frozenset()

    def pause(self, problem: str) -> None:
        """Store nothing for a while: the disk is full."""
        self._full_until = self._monotonic() + PAUSE_S
        if not self.is_full:
            _log.warning(
                "kv_store: the disk is full: jobs go on and no KV is stored, tried again every %.0f s (%s): free space "
                "there, or lower kv_store.max_bytes", PAUSE_S, problem,
            )  # fmt: skip
        self.is_full = True

    def pause_left(self) -> float:
        """Return the seconds until writing is tried again, 0 when it is now."""
        return max(0.0, self._full_until - self._monotonic())

    def make_room(self) -> bool:
        """Drop what is above the quota; returns False if so much is retained that it stays above."""
        return (upkeep := self._upkeep) is not None and upkeep.make_room()

    def sweep(self) -> None:
        """Drop what was forgotten, what nobody used for too long, and what is above the quota; also done by itself."""
        if (upkeep := self._upkeep) is not None:
            upkeep.sweep()

    def forget_later(self, keys: Iterable[bytes]) -> None:
        with self._lock:
            self._forgotten |= set(keys)

    def take_forgotten(self) -> set[bytes]:
        """Return what is to be dropped."""
        with self._lock:
            keys, self._forgotten = self._forgotten, set()
            return keys

    def note_dropped(self, keys: Sequence[bytes]) -> None:
        """Note blocks that are not stored any more, and tell of them."""
        self.index.remove(keys)
        for key in keys:
            self._told.pop(key, None)
        if self.events is not None:
            try:
                self.events.on_dropped(keys)
            except BaseException:  # noqa: BLE001 - the files are gone whatever is noted of it
                _log.exception("stored KV that was dropped could not be noted")

    def set_limits(self, free_bytes: Mapping[str, int]) -> None:
        """Fix the quota of nodes that have none yet, from what is free on their disks."""
        held = self.index.node_bytes
        for node, free in free_bytes.items():
            share = int(_SHARE_OF_DISK * (free + held.get(node, 0)))
            self.limits.setdefault(node, self.settings.max_bytes or share)

    @property
    def size_bytes(self) -> int:
        """Bytes of the stores of all nodes."""
        return sum(self.index.node_bytes.values())

    @property
    def max_bytes(self) -> int:
        """The quotas of all nodes together, 0 while no node is known."""
        return sum(self.limits.values())


def _apart(blocks: Sequence[KvBlock]) -> Sequence[KvBlock]:
    """Return the first blocks, as far as they share no page: blocks that begin alike do, and are read one by one."""
    used: set[int] = set()
    for count, block in enumerate(blocks):
        if used & set(block.pages):
            return blocks[:count]
        used.update(block.pages)
    return blocks
