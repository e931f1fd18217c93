"""The account of stored KV: which blocks belong to which documents, and the end of those whose documents are gone."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from cluster.common.errors import JobStoreError
from cluster.common.text_format import one_line
from cluster.jobs.store import JobStore

_log = logging.getLogger(__name__)


class StoredKv(Protocol):
    """What is needed of `cluster.kv_store.store.KvStore`."""

    is_enabled: bool

    def forget_document(self, keys: Iterable[bytes]) -> None:
        """Drop blocks; whoever listens to the store is told when they are gone."""


class DocumentKv:
    """Listens to the store of KV (`KvEvents`); any thread may call it.

    A block stays in the table until the store says that it is dropped. One that no document has any more is forgotten
    again at every sweep until then, so a write that was under way, and a crash at any time, leave nothing behind.
    """

    def __init__(self, store: JobStore, kv: StoredKv) -> None:
        self._store = store
        self._kv = kv
        self._lock = threading.Lock()  # of `_waiting` and `_importing`
        self._writing = threading.Lock()  # batches are written in the order they were told in
        self._waiting: list[tuple[str, bytes, int] | bytes] = []  # stored blocks, and keys of dropped ones
        self._importing: dict[str, frozenset[bytes]] = {}  # blocks that are being imported, by their account
        self._is_closed = False

    def on_stored(self, document_id: str, key: bytes, size: int) -> None:
        """Note a stored block of a document; `flush` writes it."""
        with self._lock:
            self._waiting.append((document_id, key, size))
        if self._is_closed:
            self.flush()

    def on_dropped(self, keys: Sequence[bytes]) -> None:
        """Note that blocks are gone; `flush` writes it."""
        with self._lock:
            self._waiting += keys
        if self._is_closed:
            self.flush()

    def flush(self) -> bool:
        """Write what was told since the last call, in its order; False: what the store refuses is tried again later."""
        with self._writing:
            with self._lock:
                batch, self._waiting = self._waiting, []
            at = 0
            try:
                while at < len(batch):
                    end = at + 1
                    while end < len(batch) and isinstance(batch[end], bytes) == isinstance(batch[at], bytes):
                        end += 1
                    part = batch[at:end]
                    self._store.add_kv(item for item in part if isinstance(item, tuple))
                    self._store.remove_kv(item for item in part if isinstance(item, bytes))
                    at = end
            except JobStoreError as error:
                with self._lock:
                    self._waiting = batch[at:] + self._waiting
                _log.warning("stored KV of documents cannot be noted now: %s", one_line(error))
                return False
        return True

    def sweep(self) -> None:
        """Forget the blocks whose documents are all gone. Raises JobStoreError."""
        self.flush()
        if not self._kv.is_enabled:
            return
        held = self._held()  # what is being imported may be a document's when the table is read, or only after that
        if orphans := set(self._store.orphan_kv()) - held - self._held():
            self._kv.forget_document(orphans)

    def _held(self) -> set[bytes]:
        with self._lock:
            return set().union(*self._importing.values())

    @contextmanager
    def importing(self, keys: Iterable[bytes]) -> Iterator[None]:
        """Keep account of blocks that are put into the store inside of the block.

        They stay those of no document until `add_imported`: when the block, or the process, ends before, the next sweep
        drops them.
        """
        account, held = f"import_{secrets.token_hex(16)}", frozenset(keys)
        with self._lock:
            self._importing[account] = held
        try:
            self._write([(account, key, 0) for key in held])
            yield
        finally:
            with self._lock:
                del self._importing[account]
            try:
                self.sweep()
            except JobStoreError as error:
                _log.warning("stored KV of an import cannot be looked at now: %s", one_line(error))

    def add_imported(self, document_id: str, sizes: Mapping[bytes, int]) -> None:
        """Give imported blocks, by their bytes, to a document, which may be stored after that. Raises JobStoreError."""
        self._write([(document_id, key, size) for key, size in sizes.items()])

    def _write(self, blocks: Sequence[tuple[str, bytes, int]]) -> None:
        """Write blocks at once, after what was told before. Raises JobStoreError."""
        with self._lock:
            self._waiting += blocks
        if not self.flush():
            raise JobStoreError("stored KV of documents cannot be noted now: try again")

    def close(self) -> None:
        """Write at once from now on: a pipeline that ends stores its last blocks after the job service has ended."""
        self._is_closed = True
        self.flush()
