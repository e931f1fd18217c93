"""Writes computed blocks to the store, behind the steps: a thread takes them from a backlog.

A block holds no pages until its turn comes. Then its pages are pinned if they still have its content, written by every
shard, and unpinned; else it is dropped with the later blocks of its prompt. So a slow disk means fewer stored blocks,
and no step waits for it. What could not be written is tried again after a pause, in which nothing is pinned. Blocks
that were dropped are offered again by the next prompt that begins with them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from cluster.kv_store.engine_calls import Detached, EngineCalls
from cluster.kv_store.shard_calls import ShardCalls, ShardLost
from cluster.scheduler.page_pool import PagePool
from cluster.scheduler.stored_prefix import Offer
from protos.stage.messages import KvBlock

if TYPE_CHECKING:
    from cluster.kv_store.store import KvStore

BATCH = 4  # blocks of a write, and so the most that are pinned
PAUSE_S = 60.0  # after a write for which the disk had no room
RETRY_S = (1.0, 4.0)  # pauses before blocks are tried again that could not be written for another reason
_log = logging.getLogger(__name__)


class NotWritten(Exception):
    """A shard has said why it did not write a block."""


class KvWriter:
    """The thread that stores the blocks of one pipeline."""

    def __init__(
        self, store: KvStore, calls: ShardCalls, engine: EngineCalls, pool: PagePool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._store = store
        self._backlog = store.backlog  # of this pipeline: the next one has another
        self._calls = calls
        self._engine = engine
        self._pool = pool
        self._claims = store.claims
        self._clock = clock
        self._closing = threading.Event()
        self._has_given_up = False  # since the last success: nothing is tried twice
        self._thread = threading.Thread(target=self._run, name="kv writer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Let the write under way be the last one."""
        self._closing.set()
        self._backlog.close()

    def join(self, within_s: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(within_s)

    def _run(self) -> None:
        while offers := self._backlog.take(BATCH):
            self._closing.wait(self._store.pause_left())
            claimed = self._claims.take(offer.key for offer in offers)
            try:
                self._drop(self._try(offers, claimed))
            except Detached:
                return
            except ShardLost as error:  # it may still be at work: nothing is unpinned or given back
                _log.warning("stored KV: not written: %s", error)
                claimed = set()
                self._drop(offers)
            except NotWritten as error:
                _log.warning("stored KV: a block was not written: %s", error)
                self._drop([offer for offer in offers if not self._store.index.has(offer.key)])
            except BaseException:  # noqa: BLE001 - other blocks are stored
                _log.exception("stored KV: %d blocks could not be written", len(offers))
                self._drop(offers)
            finally:
                self._claims.give_back(claimed)
                self._backlog.done()
                self._store.end_write()

    def _try(self, offers: Sequence[Offer], claimed: Collection[bytes]) -> Sequence[Offer]:
        """Store blocks as `_take` does, which may need more than one attempt; raises what the last one has raised."""
        pauses = iter(() if self._has_given_up else RETRY_S)
        while True:
            try:
                lost = self._take(offers, claimed)
            except (Detached, ShardLost):
                raise
            except Exception:
                if (pause_s := next(pauses, None)) is None or self._closing.wait(pause_s):
                    self._has_given_up = True
                    raise
            else:
                self._has_given_up = False
                return lost

    def _take(self, offers: Sequence[Offer], claimed: Collection[bytes]) -> Sequence[Offer]:
        """Store the blocks that are not stored yet, and not being dropped, once it is noted whose they are.

        Returns those that are to be given up. Raises NotWritten and ShardLost.
        """
        store = self._store
        allowed = store.account([*takewhile(lambda offer: offer.key in claimed, offers)])
        rest = offers[len(allowed) :]
        missing = [offer for offer in allowed if not store.index.has(offer.key)]
        if not missing or self._closing.is_set():
            return rest
        is_reachable = not missing[0].start or store.index.has(missing[0].parent)
        if not is_reachable or not store.make_room():
            return [*missing, *rest]
        blocks = self._engine.call(lambda: self._pin(missing))
        written = self._write(blocks) if blocks else 0
        return [*missing[written:], *rest]

    def _pin(self, offers: Sequence[Offer]) -> list[KvBlock]:
        """Pin the pages of the first blocks that are all there (engine thread)."""
        blocks: list[KvBlock] = []
        for offer in offers:
            if (pages := self._pool.pin(offer.hashes)) is None:
                break
            blocks.append(offer.block(pages))
        return blocks

    def _write(self, blocks: Sequence[KvBlock]) -> int:
        """Write pinned blocks; returns how many of the first, not all when the disk is full.

        Raises:
            NotWritten: one could not be written, for another reason. ShardLost.
        """
        began = self._clock()
        stored = self._calls.store(blocks)
        done = blocks[: stored.blocks]
        self._store.note_stored(done, stored.bytes, self._clock() - began)
        self._engine.call(lambda: self._unpin(blocks, done))
        if len(done) < len(blocks):
            if not stored.is_full:
                raise NotWritten(stored.problem or "no reason given")
            self._store.pause(stored.problem)
        return len(done)

    def _unpin(self, blocks: Sequence[KvBlock], stored: Sequence[KvBlock]) -> None:
        """Give pages back (engine thread)."""
        for block in stored:
            self._pool.mark_stored(block)
        for block in blocks:
            self._pool.unpin(block.pages)

    def _drop(self, offers: Sequence[Offer]) -> None:
        """Give up blocks, and the later ones of their prompt, which nobody could use without them."""
        if offers:
            dropped = len(offers) + self._backlog.drop_request(offers[-1].sequence)
            self._store.stats.add(not_stored_blocks=dropped)
