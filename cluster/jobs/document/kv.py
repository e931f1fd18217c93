"""The account of stored KV: which blocks belong to which documents, and the end of those whose documents are gone."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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

    def stored_prefix(self, keys: Iterable[bytes]) -> tuple[int, int]:
        """Return how many blocks from the first on are stored, and the bytes of all these."""


class DocumentKv:
    """Listens to the store of KV (`KvEvents`); any thread may call it.

    A block is in the table before it is on disk, in one transaction with the question whether its document is there,
    and stays until the store says that it is dropped. So whatever is on disk of a document that is gone is found, after
    a crash at any point too, and what was about to be written when it was deleted is not.

    Args:
        keep_pages: lets nobody find KV in memory of other documents than those that its argument returns.
    """

    def __init__(
        self, store: JobStore, kv: StoredKv, keep_pages: Callable[[Callable[[], Collection[str]]], None]
    ) -> None:
        self._store = store
        self._kv = kv
        self._keep_pages = keep_pages
        self._lock = threading.Lock()  # of `_importing`
        self._importing: dict[str, frozenset[bytes]] = {}  # blocks that are being imported, by their account

    def before_store(self, document_id: str, pinned_len: int, keys: Sequence[bytes]) -> bool:
        """Note blocks of a document; returns False if it is gone, or nothing can be noted now."""
        try:
            return self._store.add_kv(document_id, pinned_len, keys)
        except JobStoreError as error:
            _log.warning("KV of document %s is not stored: %s", document_id, one_line(error))
            return False

    def on_dropped(self, keys: Sequence[bytes]) -> None:
        """Note that blocks are gone. What cannot be noted is dropped once more, when their documents are gone."""
        try:
            self._store.remove_kv(keys)
        except JobStoreError as error:
            _log.warning("dropped KV cannot be noted now: %s", one_line(error))

    def retained(self) -> frozenset[bytes]:
        """Return the blocks of pinned documents. Raises JobStoreError."""
        return self._store.pinned_kv()

    def sweep(self) -> None:
        """Forget the blocks and pages whose documents are all gone. Raises JobStoreError."""
        self.sweep_memory()
        if not self._kv.is_enabled:
            return
        held = self._held()  # what is being imported may be a document's when the table is read, or only after that
        if orphans := set(self._store.orphan_kv()) - held - self._held():
            self._kv.forget_document(orphans)

    def sweep_memory(self) -> None:
        """Let nobody find pages whose documents are all gone. Raises JobStoreError."""
        self._keep_pages(self._store.document_ids)

    def sizes(self, pinned_lens: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return, by document, how many blocks of one prompt are stored from its first on, and the bytes of all blocks.

        Args:
            pinned_lens: by document, the length that decides about the length scale of its jobs; the blocks of other
                scales count as bytes alone. 0: all jobs have one scale.
        """
        found = {}
        for name, blocks in self._store.document_kv(list(pinned_lens)).items():
            own = [key for key, pinned_len in blocks.items() if pinned_lens[name] in (0, pinned_len)]
            found[name] = self._kv.stored_prefix(own)[0], self._kv.stored_prefix(blocks)[1]
        return found

    def _held(self) -> set[bytes]:
        with self._lock:
            return set().union(*self._importing.values())

    @contextmanager
    def importing(self, keys: Iterable[bytes]) -> Iterator[None]:
        """Keep account of blocks that are put into the store inside of the block. Raises JobStoreError.

        They stay those of no document until `add_imported`: when the block, or the process, ends before, the next sweep
        drops them.
        """
        account, held = f"import_{secrets.token_hex(16)}", frozenset(keys)
        with self._lock:
            self._importing[account] = held
        try:
            self._store.hold_kv(account, 0, held)
            yield
        finally:
            with self._lock:
                del self._importing[account]
            try:
                self._store.release_kv(account, held)  # one may have been dropped before it was put there
                self.sweep()
            except JobStoreError as error:
                _log.warning("stored KV of an import cannot be looked at now: %s", one_line(error))

    def add_imported(self, document_id: str, pinned_len: int, keys: Iterable[bytes]) -> None:
        """Give imported blocks to a document, which may be stored after that. Raises JobStoreError.

        Args:
            pinned_len: length that decides about their length scale.
        """
        self._store.hold_kv(document_id, pinned_len, keys)
