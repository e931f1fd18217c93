"""Looks stored KV up and reads it into pages, on threads of its own: the engine only hears of the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cluster.common.units import format_bytes
from cluster.kv_store.shard_calls import ShardCalls, ShardLost
from protos.stage.messages import KvBlock

if TYPE_CHECKING:
    from cluster.kv_store.store import KvStore

BATCH = 16  # blocks of one call, at least: a request that ends meanwhile waits for no more,
BATCH_BYTES = 64 << 20  # or than for the blocks of so many bytes on all nodes
FIND_WITHIN_S = 10.0
MUTE_S = 60.0  # no look-up after one that was not answered in time: the prompts behind it are computed at once
MUTE_AFTER_LOAD_S = 600.0  # nor after such a load, which has cost a pipeline
LARGE_BYTES = 64 << 20  # from here on the log says how long it takes
_THREADS = 2  # for look-ups, and as many for loads: neither waits for the other
_log = logging.getLogger(__name__)


class KvReader:
    """Reads for one pipeline."""

    def __init__(
        self, store: KvStore, calls: ShardCalls, post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """Args: `post` queues a function for the engine's thread, on which all answers are given."""
        self._store = store
        self._calls = calls
        self._post = post
        self._clock = clock
        self._finders = ThreadPoolExecutor(_THREADS, "kv find")
        self._closed = False
        self._loaders = ThreadPoolExecutor(_THREADS, "kv load")

    def find(self, keys: Sequence[bytes], on_found: Callable[[int], None]) -> None:
        """Answer how many of the first blocks are stored; whatever goes wrong, none are."""
        try:
            self._finders.submit(self._find, keys, on_found)
        except RuntimeError:  # closed: the engine still works for a moment
            self._post(lambda: on_found(0))

    def load(
        self, blocks: Sequence[KvBlock], is_wanted: Callable[[], bool], on_loaded: Callable[[int], None],
        on_lost: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Read blocks; answer how many of the first are in their pages now.

        Args:
            is_wanted: asked between calls, on another thread.
            on_lost: called instead when a shard may still write to the pages, with the reason.
        """
        try:
            self._loaders.submit(self._load, blocks, is_wanted, on_loaded, on_lost)
        except RuntimeError:  # closed
            self._post(lambda: on_loaded(0))

    def close(self) -> None:
        """Begin nothing more; what is under way ends by itself."""
        self._closed = True
        self._finders.shutdown(wait=False, cancel_futures=True)
        self._loaders.shutdown(wait=False, cancel_futures=True)

    def _find(self, keys: Sequence[bytes], on_found: Callable[[int], None]) -> None:
        found = 0
        try:
            if self._clock() >= self._store.mute_until:
                began = self._store.now()
                found = self._calls.find(keys, FIND_WITHIN_S)
                self._store.note_found(keys, found, began)
        except TimeoutError as error:
            self._mute(MUTE_S, str(error))
        except BaseException:  # noqa: BLE001 - the prompt is computed
            _log.exception("stored KV could not be looked up")
        self._post(lambda: on_found(found))

    def _load(
        self, blocks: Sequence[KvBlock], is_wanted: Callable[[], bool], on_loaded: Callable[[int], None],
        on_lost: Callable[[str], None],
    ) -> None:  # fmt: skip
        done = 0
        expected = sum(self._store.index.size(block.key) for block in blocks)
        is_told = expected < LARGE_BYTES
        count = max(BATCH, BATCH_BYTES * len(blocks) // max(1, expected))
        try:
            while done < len(blocks) and is_wanted():
                is_told = is_told or self._tell(expected, blocks)
                batch = blocks[done : done + count]
                began = self._clock()
                loaded = self._calls.load(batch)
                self._store.note_loaded(batch, loaded, self._clock() - began)
                done += loaded.blocks
                if loaded.blocks < len(batch):
                    break
        except ShardLost as error:
            reason = f"stored KV could not be read: {error}"
            if error.is_late:
                self._mute(MUTE_AFTER_LOAD_S, reason)
            if not self._closed:  # else the engine is about to end, and nobody gets these pages
                self._post(lambda: on_lost(reason))
            return
        except BaseException:  # noqa: BLE001 - no page was touched since the last call
            _log.exception("stored KV could not be read")
        self._post(lambda: on_loaded(done))

    def _mute(self, seconds: float, reason: str) -> None:
        self._store.mute_until = self._clock() + seconds
        _log.warning("stored KV is not looked up for %.0f s: %s", seconds, reason)

    def _tell(self, size: int, blocks: Sequence[KvBlock]) -> bool:
        """Log how long a large load takes; returns False, with nothing logged, while the speed is not known."""
        if not (rate := self._store.stats.load_rate):
            return False
        tokens = sum(len(block.token_ids) for block in blocks)
        _log.info(
            "reading stored KV of %d tokens: %s at %s/s, about %.1f s",
            tokens, format_bytes(size), format_bytes(int(rate)), size / rate,
        )  # fmt: skip
        return True
