"""The KV store as the head sees it: what is looked up, read, written, kept and dropped.

One object for the life of a head. A pipeline is attached while it runs; without one, only what is known in memory can
be asked. The files themselves are the business of the shards.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from cluster.config.schema import KvStoreSection
from cluster.kv_store.backlog import Backlog
from cluster.kv_store.engine_calls import EngineCalls
from cluster.kv_store.index import KvIndex
from cluster.kv_store.reader import BATCH, KvReader
from cluster.kv_store.shard_calls import Loaded, ShardCalls
from cluster.kv_store.stats import KvStats
from cluster.kv_store.writer import PAUSE_S, KvWriter
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.stored_prefix import Offer
from protos.stage.messages import KvBlock

if TYPE_CHECKING:
    from cluster.stages.handle import GrpcStageHandle

_SHARE_OF_DISK = 0.1  # of what is free at the start and what the store has already
_SWEEP_S = 60.0
_SWEEPS_A_LISTING = 10  # other heads may use the same folder
_FLUSH_S = 10.0  # at the end of a pipeline, for blocks that are not written yet
_CALLS_END_S = 5.0
_WRITER_ENDS_S = 1.0  # after its last call
_log = logging.getLogger(__name__)


class KvEvents(Protocol):
    """Who keeps account of the KV of documents; called on threads of the store."""

    def on_stored(self, document_id: str, key: bytes, size: int) -> None:
        """A block of a document's prompt is stored; `size` in bytes. May be told again of the same one."""

    def on_dropped(self, keys: Sequence[bytes]) -> None:
        """Blocks are not stored any more."""


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
        self.index = KvIndex()
        self.stats = KvStats()
        self.backlog = Backlog()
        self._settings = settings
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._limits: dict[str, int] = {}  # bytes, by node
        self._listers: dict[str, int] = {}  # node -> index of a shard there
        self._node_of: list[str] = []  # by shard
        self._retained: frozenset[bytes] = frozenset()
        self._to_drop: set[bytes] = set()  # until a pipeline is attached
        self._told: dict[bytes, set[str]] = {}  # key -> documents that are known to have it
        self.is_full = False  # the last write found no room on the disk: storing pauses
        self._full_until = 0.0
        self._calls: ShardCalls | None = None
        self._engine: EngineCalls | None = None
        self._pool: PagePool | None = None
        self._reader: KvReader | None = None
        self._writer: KvWriter | None = None
        self._closing = threading.Event()
        self._sweeper: threading.Thread | None = None

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
        self.backlog = Backlog()
        self._closing = threading.Event()
        self._calls, self._engine, self._pool = ShardCalls(shards), EngineCalls(post), pool
        self._node_of = [""] * len(shards)
        self._listers = {}
        self._reader = KvReader(self, self._calls, post)
        self._writer = KvWriter(self, self._calls, self._engine, pool)
        self._writer.start()
        self._sweeper = threading.Thread(target=self._sweep_on, name="kv sweeper", daemon=True)
        self._sweeper.start()

    def detach(self, flush_s: float = _FLUSH_S, within_s: float = _CALLS_END_S) -> bool:
        """Write what is left, for a moment, and leave the pipeline; may be called twice.

        Args:
            flush_s: 0 when its engine or a shard does not work any more.
            within_s: to wait for calls under way.

        Returns:
            Whether no shard is at work for the store: only then may the pages be used by another pipeline.
        """
        if self._calls is None or self._writer is None or self._engine is None or self._reader is None:
            return True
        if flush_s and not self.is_full:
            self.backlog.wait_empty(flush_s)
        self._closing.set()
        self._reader.close()
        self._engine.close()
        self._writer.close()
        are_over = self._calls.close(within_s)
        self._writer.join(_WRITER_ENDS_S)
        self._calls = self._engine = self._pool = self._reader = self._writer = None
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
                batch = blocks[at : at + BATCH]
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
        wanted = []
        for offer in offers:
            if not self.index.has(offer.key):
                wanted.append(offer)
                continue
            self.index.touch([offer.key], self.now())
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

    def retained(self, keys: Iterable[bytes]) -> None:
        """Keep exactly these blocks whatever their age and the quota: those of pinned documents."""
        self._retained = frozenset(keys)

    def stored_prefix(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """Return how many of the first blocks are stored, and their bytes on all nodes."""
        return self.index.prefix(keys)

    def forget_document(self, keys: Iterable[bytes]) -> None:
        """Drop blocks, on disk and in memory: now, or as soon as a pipeline runs and its nodes are known."""
        if not self.is_enabled:
            return
        wanted = set(keys)
        self.backlog.discard(wanted)
        with self._lock:
            self._to_drop |= wanted
        self._drop_forgotten()

    # --- of reader and writer ----------------------------------------------------------------------------------------

    def note_found(self, keys: Sequence[bytes], found: int) -> None:
        self.stats.add(found_blocks=found)
        self.index.touch(keys[:found], self.now())
        if found < len(keys):
            self.index.doubt(keys[found])

    def note_loaded(self, blocks: Sequence[KvBlock], loaded: Loaded, seconds: float) -> None:
        self.stats.add(
            loaded_blocks=loaded.blocks, loaded_bytes=loaded.bytes, load_s=seconds, damaged_blocks=loaded.damaged
        )
        if loaded.blocks < len(blocks):
            self.index.doubt(blocks[loaded.blocks].key)
            _log.warning("stored KV: a block could not be read and is computed: %s", loaded.problem or "it is gone")

    def note_stored(self, blocks: Sequence[KvBlock], sizes: Sequence[int], seconds: float) -> None:
        """Note blocks that were written; `sizes` are the new bytes of all of them, by shard."""
        nodes: dict[str, int] = {}
        for node, size in zip(self._node_of, sizes, strict=True):
            nodes[node] = nodes.get(node, 0) + size
        each = {node: size // max(1, len(blocks)) for node, size in nodes.items() if node}
        for block in blocks:
            self.index.add(block.key, block.parent, block.start, each, self.now())
        self.stats.add(stored_blocks=len(blocks), stored_bytes=sum(sizes), store_s=seconds)
        self.is_full = self.is_full and not blocks

    def end_write(self) -> None:
        """Drop what was forgotten while it was written."""
        self.backlog.done()
        self._drop_forgotten()

    def tell_stored(self, offers: Sequence[Offer]) -> None:
        """Tell of stored blocks whose document has them."""
        for offer in offers:
            if offer.document_id and self.events is not None:
                try:
                    self.events.on_stored(offer.document_id, offer.key, self.index.size(offer.key))
                except BaseException:  # noqa: BLE001 - it is offered again with the next question
                    _log.exception("stored KV of document %s could not be noted", offer.document_id)
                else:
                    self._told.setdefault(offer.key, set()).add(offer.document_id)

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
        self._evict(self.index.victims(self._limits, self._retained))
        held = self.index.node_bytes
        return all(held.get(node, 0) <= limit for node, limit in self._limits.items())

    # --- upkeep (a thread) -------------------------------------------------------------------------------------------

    def _sweep_on(self) -> None:
        closing, sweeps = self._closing, 0
        while not closing.is_set():
            try:
                if sweeps % _SWEEPS_A_LISTING == 0 or not self._listers:
                    self._list()
                self.sweep()
            except BaseException:  # noqa: BLE001 - a problem of a disk must not end the upkeep of others
                if not closing.is_set():
                    _log.exception("the upkeep of stored KV failed and is tried again")
            sweeps += 1
            closing.wait(_SWEEP_S)

    def sweep(self) -> None:
        """Drop what was forgotten, what nobody used for too long, and what is above the quota."""
        self._drop_forgotten()
        self._evict(self.index.expired(self.now() - self._settings.ttl_s, self._retained))
        self.make_room()

    def _list(self) -> None:
        """Read from every node what is stored there."""
        if (calls := self._calls) is None:
            return
        listed: dict[str, list[Any]] = {}
        free: dict[str, int] = {}
        listers: dict[str, int] = {}
        for index, pieces in calls.entries().items():
            for piece in pieces:
                self._node_of[index] = piece.node
                if listers.setdefault(piece.node, index) == index:
                    listed.setdefault(piece.node, []).extend(piece.entries)
                    free[piece.node] = piece.free_bytes
        self.index.replace(listed)
        held = self.index.node_bytes
        for node in listers:
            share = int(_SHARE_OF_DISK * (free[node] + held.get(node, 0)))
            self._limits.setdefault(node, self._settings.max_bytes or share)
        self._listers = listers

    def _evict(self, keys: Sequence[bytes]) -> None:
        if keys:
            self._drop(keys)
            self.stats.add(evicted_blocks=len(keys))

    def _drop_forgotten(self) -> None:
        if not self._listers:
            return
        with self._lock:
            busy = self.backlog.busy  # a write under way is waited for
            keys, self._to_drop = self._to_drop - busy, self._to_drop & busy
        if keys:
            self._drop(sorted(keys), forget_pages=True)

    def _drop(self, keys: Sequence[bytes], forget_pages: bool = False) -> None:
        """Remove blocks from every node, and tell of it; `forget_pages`: from memory too."""
        calls, engine, pool = self._calls, self._engine, self._pool
        if calls is None or engine is None or pool is None:
            with self._lock:
                self._to_drop |= set(keys) if forget_pages else set()
            return
        for error in calls.drop(list(self._listers.values()), keys):
            _log.warning("stored KV: %d blocks could not be removed on a node: %s", len(keys), error)
            with self._lock:
                self._to_drop |= set(keys) if forget_pages else set()  # tried again by the next sweep
        self.index.remove(keys)
        for key in keys:
            self._told.pop(key, None)
        engine.post(lambda: (pool.forget_blocks if forget_pages else pool.unmark_stored)(keys))
        if self.events is not None:
            try:
                self.events.on_dropped(keys)
            except BaseException:  # noqa: BLE001 - the files are gone whatever is noted of it
                _log.exception("stored KV that was dropped could not be noted")

    @property
    def size_bytes(self) -> int:
        """Bytes of the stores of all nodes."""
        return sum(self.index.node_bytes.values())

    @property
    def max_bytes(self) -> int:
        """The quotas of all nodes together, 0 while no node is known."""
        return sum(self._limits.values())
