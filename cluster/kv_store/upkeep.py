"""Keeps the stores of all nodes within their quota, drops what is old or forgotten, and knows what they have."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cluster.kv_store.engine_calls import EngineCalls
from cluster.kv_store.shard_calls import ShardCalls
from cluster.scheduler.page_pool import PagePool

if TYPE_CHECKING:
    from cluster.kv_store.store import KvStore
    from cluster.stages.handle import GrpcStageHandle
    from protos.stage import stage_pb2 as pb

SWEEP_S = 60.0
RENEW_S = (
    3600.0  # how far the files may lag behind the use of a block, or an eighth of the time to live if that is less
)
_TOUCH_BATCH = 4096  # blocks of one call
_SWEEPS_A_LISTING = 10  # other heads may use the same folder
_log = logging.getLogger(__name__)


class KvUpkeep:
    """Keeps the stores that the shards of one pipeline reach; has a thread."""

    def __init__(self, store: KvStore, calls: ShardCalls, engine: EngineCalls, pool: PagePool) -> None:
        self._store = store
        self._calls = calls
        self._engine = engine
        self._pool = pool
        self._claims = store.claims
        self._listers: dict[str, int] = {}  # node -> index of a shard there
        self._node_of = [""] * len(calls.shards)  # by shard
        self._listing = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv upkeep", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Begin nothing more; the thread ends soon."""
        self._closing.set()

    def sweep(self) -> None:
        """Drop what was forgotten, what nobody used for too long, and what is above the quota; renew files in use."""
        store = self._store
        self.drop_forgotten()
        self._evict(store.index.expired(store.now() - store.settings.ttl_s, store.retained_keys))
        self.make_room()
        self.renew()

    def make_room(self) -> bool:
        """Drop what is above the quota; returns False if so much is retained that it stays above."""
        store = self._store
        self._evict(store.index.victims(store.limits, store.retained_keys))
        held = store.index.node_bytes
        return all(held.get(node, 0) <= limit for node, limit in store.limits.items())

    def drop_forgotten(self) -> None:
        """Drop what `KvStore.forget_document` was told of, unless it is being written or no node is known."""
        while self._listers and (keys := self._store.take_forgotten()):
            ours = self._drop(sorted(keys), forget_pages=True)
            self._store.forget_later(keys - ours)
            if not ours:
                return  # what is left may have been written while others were dropped: only then once more

    def renew(self) -> None:
        """Let files say that their block is used, from memory too: other heads and the next start go by that."""
        store = self._store
        keys = store.index.take_unsaved(min(RENEW_S, store.settings.ttl_s / 8)) if self._listers else []
        for at in range(0, len(keys), _TOUCH_BATCH):
            self._calls.touch(list(self._listers.values()), keys[at : at + _TOUCH_BATCH])

    def read_listing(self) -> None:
        """Read from every node what is stored there."""
        with self._listing:
            self._store.index.begin_listing()
            listed: dict[str, list[Any]] = {}
            free: dict[str, int] = {}
            listers: dict[str, int] = {}
            for index, pieces in self._list().items():
                for piece in pieces:
                    self._node_of[index] = piece.node
                    if listers.setdefault(piece.node, index) == index:
                        listed.setdefault(piece.node, []).extend(piece.entries)
                        free[piece.node] = piece.free_bytes
            if listers and not self._closing.is_set():  # else another pipeline may have stored more meanwhile
                self._store.index.replace(listed)
                self._store.set_limits(free)
                # a node of this pipeline that does not answer now has its blocks all the same
                self._listers = self._listers | listers  # another thread may iterate over it

    def _list(self) -> dict[int, list[pb.KvEntries]]:
        """Return the listings of the nodes; once the node of every shard is known, one shard of each reads it."""
        if all(self._node_of):
            listings = self._calls.entries(sorted(self._listers.values()))
            if len(listings) == len(self._listers):
                return listings
        return self._calls.entries()

    def node_shards(self) -> list[GrpcStageHandle]:
        """Return one shard of every node that is known."""
        return [self._calls.shards[index] for index in self._listers.values()]

    def by_node(self, sizes: Iterable[int]) -> dict[str, int]:
        """Return bytes by node, from those by shard; what is on nodes that are not known yet is left out."""
        nodes: dict[str, int] = {}
        for node, size in zip(self._node_of, sizes, strict=True):
            nodes[node] = nodes.get(node, 0) + size
        nodes.pop("", None)
        return nodes

    def _run(self) -> None:
        sweeps = 0
        while not self._closing.is_set():
            try:
                if sweeps % _SWEEPS_A_LISTING == 0 or not self._listers:
                    self.read_listing()
                if sweeps:
                    self.sweep()
                else:  # whoever pins documents has time to say so
                    self.drop_forgotten()
            except BaseException:  # noqa: BLE001 - a problem of one disk or one minute must not end it
                if not self._closing.is_set():
                    _log.exception("the upkeep of stored KV failed and is tried again")
            sweeps += 1
            self._closing.wait(SWEEP_S)

    def _evict(self, keys: Sequence[bytes]) -> None:
        if keys:
            self._store.stats.add(evicted_blocks=len(self._drop(keys)))

    def _drop(self, keys: Sequence[bytes], forget_pages: bool = False) -> set[bytes]:
        """Remove blocks from every node, and tell of it; `forget_pages`: from memory too.

        Returns those that are gone: not what is being written, and none if a node does not answer or could not.
        """
        claimed = self._claims.take(keys)
        try:
            ours = [key for key in keys if key in claimed]
            unknown = [index for index, node in enumerate(self._node_of) if not node]
            problem = self._calls.drop([*self._listers.values(), *unknown], ours) if ours else ""
            pool = self._pool
            self._engine.post(lambda: (pool.forget_blocks if forget_pages else pool.unmark_stored)(ours))
            if not problem:
                self._store.note_dropped(ours)
                return claimed
            self._store.index.remove(ours)
            _log.warning("stored KV: %d blocks could not be removed on a node: %s", len(ours), problem)
            return set()
        finally:
            self._claims.give_back(claimed)
