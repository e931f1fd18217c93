"""Documents on disk: one file each, named by its content, beside its record in the job store and its token ids.

A document that was appended to another has a file of its own with the whole text, so that each can go alone; its id is
a hash of the id of the other and what was added, since the seam decides about its tokens.

Only this module writes the folder. The record is written after the file and removed before it, so a crash can leave
only a file without a record, which the next sweep removes.
"""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO

from cluster.common.errors import JobStoreError, JobStoreFull
from cluster.jobs.document.chain import ChainDigest, chain_ids, digest_after, id_of
from cluster.jobs.document.disk import read_file, sync_folder, write_all
from cluster.jobs.document.token_file import SUFFIX, TEMPORARY, tokens_path
from cluster.jobs.model import (
    DocumentDamaged,
    DocumentRecord,
    InvalidJob,
    JobConflict,
    JobNotFound,
    NotAllowedNow,
    ServiceBusy,
    check_id,
    document_not_found,
)
from cluster.jobs.sqlite.files import NO_SPACE
from cluster.jobs.store import JobStore
from cluster.jobs.tenants.limits import check_document_bytes
from cluster.jobs.tenants.tenant import ANYONE, Tenant, owned_id

MAX_NAME = 255  # characters
MAX_LISTED = 10_000  # documents, some megabytes
_TEMPORARY = ".upload-"
assert TEMPORARY.startswith(_TEMPORARY)
_SPOOL_BYTES = 8 << 20  # of a file without a name, in memory
_ROOM_AFTER_S = 60.0  # documents expire by the minute
_OF_THE_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # nothing is wrong with the file


class DocumentStore:
    """Stores, reads and deletes documents; all methods may be called from any thread."""

    def __init__(
        self, folder: Path, store: JobStore, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        """Open a folder that no other process uses, and remove the uploads that an earlier one has not finished.

        Args:
            ttl_s: seconds after its upload at which an unused document expires.
            max_bytes: of all documents together.
            clock: gives seconds since 1970.
        """
        self.on_deleted: Callable[[], None] = lambda: None  # called when documents were deleted
        self._folder = folder
        self.store = store
        self._ttl_s = ttl_s
        self._clock = clock
        self._max_bytes = max_bytes
        self._lock = threading.Lock()  # names in the folder and their records change together
        self._uploading: dict[str, tuple[int, str]] = {}  # temporary files a sweep must leave alone: bytes, owner
        self._provisional: dict[str, int] = {}  # documents that only submissions have brought: how many of them
        with self._errors():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(folder, os.R_OK | os.W_OK | os.X_OK) or not folder.stat().st_mode & 0o222:
                raise JobStoreError(f"documents {folder}: is read-only: must be a folder that we may write")
            for path in folder.iterdir():
                if path.name.startswith(_TEMPORARY):
                    path.unlink(missing_ok=True)

    def put(
        self, name: str, pieces: Iterable[bytes], max_bytes: int, *, scale_len: int = 0, pinned: bool = False,
        source_hash: str = "", append_to: str = "", tenant: Tenant = ANYONE, shared: bool = False, purpose: str = "",
    ) -> DocumentRecord:  # fmt: skip
        """Store a document as it arrives; the same bytes give the same document with a new expiry and its old name.

        It is the tenant's: the same bytes of another tenant are another document.

        Args:
            scale_len: length whose length scale its jobs use; one that is appended has that of the other.
            source_hash: SHA-256 of the file that the text was taken from.
            append_to: id of the document that comes before; `max_bytes` is of both together.
            shared: every tenant may read it.
            purpose: see `DocumentRecord`.

        Raises:
            InvalidJob: it is empty, or has more than `max_bytes` (as soon as that is known). ServiceBusy: there is no
                room for it beside the others. JobConflict: it is known, with another `scale_len` that was asked for.
            JobStoreError: the disk. And whatever `pieces` raises. Nothing is left
                behind then.
        """
        said = DocumentRecord(
            "", name, 0, 0.0, 0.0, scale_len=scale_len, pinned=pinned, source_hash=source_hash, shared=shared,
            purpose=purpose,
        )  # fmt: skip
        if not append_to:
            return self._put(said, tenant, pieces, max_bytes, False)
        before = self.get(append_to)
        first = self.read(append_to, lambda size: self._check_size(size + 1, max_bytes))
        said = replace(said, name=name or before.name, scale_len=before.scale_len or scale_len)
        return self._put(said, tenant, pieces, max_bytes, False, before, first)

    @contextmanager
    def provisional(
        self, name: str, pieces: Iterable[bytes], max_bytes: int, tenant: Tenant = ANYONE
    ) -> Iterator[DocumentRecord]:
        """Store a document as `put` does, for a block; when that raises, it goes unless others have it by then."""
        record = self._put(DocumentRecord("", name, 0, 0.0, 0.0), tenant, pieces, max_bytes, True)
        is_kept = False
        try:
            yield record
            is_kept = True
        finally:
            with self._lock:
                left = self._provisional.get(record.id, 0) - 1
                if left > 0 and not is_kept:
                    self._provisional[record.id] = left
                elif self._provisional.pop(record.id, 0) and not is_kept:
                    with suppress(NotAllowedNow, JobStoreError), self._errors():  # the next sweep may do it
                        self.store.delete_document(record.id)
                        self._remove_files(record.id)

    def _put(
        self, said: DocumentRecord, tenant: Tenant, pieces: Iterable[bytes], max_bytes: int, is_provisional: bool,
        before: DocumentRecord | None = None, first: bytes = b"",
    ) -> DocumentRecord:  # fmt: skip
        """Store a document of which so much is said, with the text of the one `before` it first."""
        with self._temporary(tenant) as (descriptor, path):
            size = len(first)
            digest = digest_after(chain_ids(first, before.seams)[-1] if before else "")
            if first:
                self._check_room(path.name, size, tenant)
                with self._errors():
                    write_all(descriptor, first)
            size = self._receive(descriptor, path.name, tenant, pieces, max_bytes, size, digest.update)
            if size == len(first):
                raise InvalidJob("document: 0 bytes: must have at least 1")
            now = self._clock()
            record = replace(
                said, id=owned_id(tenant.name, id_of(digest)), owner=tenant.name, name=display_name(said.name),
                size_bytes=size, created=now, used=now, expires=0.0 if said.pinned else now + self._ttl_s,
                parent=before.id if before else "", kernel_family=before.kernel_family if before else "",
                seams=(*before.seams, len(first)) if before else (),
            )  # fmt: skip
            return self._keep(path, record, is_provisional)

    def put_archived(
        self, record: DocumentRecord, pieces: Iterable[bytes], max_bytes: int, finish: Callable[[], str],
        tenant: Tenant = ANYONE,
    ) -> DocumentRecord:  # fmt: skip
        """Store a document that comes from elsewhere, with what its record says; otherwise as `put`.

        Args:
            record: whose id, size, name, length scale, source, parent and seams count; `id` and `parent` are those that
                the content has.
            finish: called when the text is complete and right, returns the family of the kernels of its KV; when it
                raises, nothing is stored.
        """
        self._check_size(record.size_bytes, max_bytes)
        with self._temporary(tenant) as (descriptor, path):
            chain = ChainDigest(record.seams)
            size = self._receive(descriptor, path.name, tenant, pieces, max_bytes, 0, chain.update)
            if size != record.size_bytes or chain.document_id != record.id:
                raise InvalidJob(f"document: {record.id}: {size} bytes of other content")
            family, now = finish(), self._clock()
            own, parent = (owned_id(tenant.name, one) if one else "" for one in (record.id, record.parent))
            known = self.store.get_document(own)
            scale_len = known.scale_len if known is not None and known.scale_len > 0 else record.scale_len
            return self._keep(
                path,
                replace(
                    record, id=own, name=display_name(record.name), created=now, used=now, expires=now + self._ttl_s,
                    kernel_family=family, scale_len=scale_len, parent=parent, owner=tenant.name,
                ),
                False,
            )  # fmt: skip

    def spool(self) -> IO[bytes]:
        """Return a file without a name, in memory while it is small."""
        return tempfile.SpooledTemporaryFile(_SPOOL_BYTES, prefix=_TEMPORARY, dir=str(self._folder))

    @contextmanager
    def receiving(self, tenant: Tenant) -> Iterator[Callable[[int], None]]:
        """Count a file that is on its way among the uploads: what is yielded is told its bytes so far.

        That raises ServiceBusy: there is no room for it.
        """
        name = f"{_TEMPORARY}{secrets.token_hex(16)}"
        try:
            yield lambda size: self._check_room(name, size, tenant)
        finally:
            with self._lock:
                self._uploading.pop(name, None)

    def _receive(
        self, descriptor: int, temporary: str, tenant: Tenant, pieces: Iterable[bytes], max_bytes: int, size: int,
        update: Callable[[bytes], None],
    ) -> int:  # fmt: skip
        """Write what arrives, `update` a hash with it, and return the bytes with the `size` of before."""
        for piece in pieces:
            size += len(piece)
            self._check_size(size, max_bytes)
            self._check_room(temporary, size, tenant)
            update(piece)
            with self._errors():
                write_all(descriptor, piece)
        with self._errors():
            os.fsync(descriptor)
        return size

    @staticmethod
    def _check_size(size: int, max_bytes: int) -> None:
        if size > max_bytes:
            raise InvalidJob(f"document: {size} bytes or more: must be at most {max_bytes} (server.max_document_bytes)")

    def _check_room(self, temporary: str, size: int, tenant: Tenant) -> None:
        """Refuse an upload of so many bytes when there is no room for it beside the documents and other uploads.

        What is told is nothing of other tenants.
        """
        with self._lock:
            self._uploading[temporary] = size, tenant.name
            uploads = [*self._uploading.values()]
            total = self.store.documents_size() + sum(size for size, _ in uploads)
            if tenant.max_document_bytes is not None:
                own = self.store.documents_size(tenant.name) + sum(size for size, who in uploads if who == tenant.name)
                check_document_bytes(tenant, own)
        if total > self._max_bytes:
            raise ServiceBusy(
                f"documents: no room for {size} bytes: must be at most {self._max_bytes} together "
                "(server.max_documents_bytes): delete some, or wait until some expire",
                _ROOM_AFTER_S,
            )

    def read(self, document_id: str, check_size: Callable[[int], None] = lambda size: None) -> bytes:
        """Return the bytes.

        Args:
            check_size: called with the recorded size before anything is read; raises to refuse it.

        Raises:
            JobNotFound: no record, or no file. DocumentDamaged: the file is not what was uploaded, or cannot be read.
            JobStoreError: the folder cannot be used, or the process is out of files or memory.
        """
        record = self.get(document_id)
        check_size(record.size_bytes)
        try:
            content = read_file(self.path(document_id), record.size_bytes)
        except OSError as error:
            if error.errno in _OF_THE_PROCESS or not os.access(self._folder, os.R_OK | os.X_OK):
                with self._errors():
                    raise
            if isinstance(error, FileNotFoundError):
                raise JobNotFound(f"document: {document_id}: its file is gone: upload it again") from error
            raise DocumentDamaged(
                f"document: {document_id}: its file cannot be read ({error.strerror}): upload it again"
            ) from error
        if len(content) != record.size_bytes:
            more = " or more" if len(content) > record.size_bytes else ""
            raise DocumentDamaged(
                f"document: {document_id}: {len(content)} bytes{more}: must be {record.size_bytes}: upload it again"
            )
        if owned_id(record.owner, chain_ids(content, record.seams)[-1]) != document_id:
            raise DocumentDamaged(f"document: {document_id}: its file has other content: upload it again")
        return content

    def get(self, document_id: str) -> DocumentRecord:
        """Return the record. Raises InvalidJob (not an id) and JobNotFound."""
        record = self.store.get_document(check_id(document_id, "doc"))
        if record is None:
            raise document_not_found(document_id)
        return record

    def list(self, owner: str | None = None) -> Sequence[DocumentRecord]:
        """Return the newest MAX_LISTED documents that an owner sees, or (None) of all, newest first."""
        return self.store.list_documents(MAX_LISTED, owner)

    def pin(self, document_id: str, pinned: bool) -> DocumentRecord:
        """Keep a document until it is unpinned or deleted, or let it expire as if it were used now; returns it."""
        check_id(document_id, "doc")
        self.store.pin_document(document_id, pinned, self._clock() + self._ttl_s)
        return self.get(document_id)

    def delete(self, document_id: str) -> None:
        """Delete a document with its token ids and stored KV.

        Raises JobNotFound, and NotAllowedNow while an unfinished job uses it.
        """
        self.get(document_id)
        with self._lock, self._errors():
            self.store.delete_document(document_id)
            self._remove_files(document_id)
        self.on_deleted()

    def _remove_files(self, document_id: str) -> None:
        path = self.path(document_id)
        for name in (path, tokens_path(path)):
            name.unlink(missing_ok=True)

    def sweep(self, now: float) -> int:
        """Delete expired documents that no unfinished job uses (returns how many), and files that a crash left."""
        with self._lock, self._errors():
            removed = self.store.expire_documents(now)
            known = self.store.document_ids() | set(self._uploading)
            for path in self._folder.iterdir():
                if (
                    path.name.removesuffix(SUFFIX) not in known
                    and not path.name.startswith(TEMPORARY)
                    and path.name.startswith((_TEMPORARY, "doc_"))
                ):
                    path.unlink(missing_ok=True)
        return removed

    def path(self, document_id: str) -> Path:
        """Return the file of a document."""
        return self._folder / check_id(document_id, "doc")

    @contextmanager
    def _temporary(self, tenant: Tenant) -> Iterator[tuple[int, Path]]:
        """Make a file with mode 0600 that is deleted at the end of the block unless it was renamed."""
        self.store.check()  # the folder may have gone with it
        with self._lock, self._errors():
            descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=self._folder)
            path = Path(name)
            self._uploading[path.name] = 0, tenant.name
        try:
            yield descriptor, path
        finally:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            with self._lock:
                del self._uploading[path.name]

    def _keep(self, temporary: Path, record: DocumentRecord, is_provisional: bool) -> DocumentRecord:
        """Give the file its name and the document its record, or do neither."""
        path = self.path(record.id)
        with self._lock, self._errors():
            known = self.store.get_document(record.id) if record.scale_len > 0 and not record.parent else None
            if known is not None and record.scale_len != known.scale_len > 0:
                raise JobConflict(
                    f"max_tokens: {record.scale_len}: document {record.id} is known with {known.scale_len}, on which "
                    "its KV depends: leave max_tokens out, or delete the document first"
                )
            is_new = not path.exists()
            temporary.replace(path)  # replaces a file that was damaged, too
            try:
                sync_folder(self._folder)
                stored = self.store.put_document(record)
            except BaseException:
                if is_new:
                    path.unlink(missing_ok=True)
                raise
            if not is_provisional:
                self._provisional.pop(record.id, None)  # somebody uploaded it: it stays
            elif is_new or record.id in self._provisional:
                self._provisional[record.id] = self._provisional.get(record.id, 0) + 1
            return stored

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in NO_SPACE:
                raise JobStoreFull(f"documents {self._folder}: {error.strerror}: free space on its disk") from error
            remedy = "check its disk and its permissions: must be a folder that we may write"
            raise JobStoreError(f"documents {self._folder}: {error.strerror}: {remedy}") from error


def display_name(name: str) -> str:
    """Return a name that can be shown on one line: 1 to MAX_NAME printable characters. It never becomes a path."""
    return "".join(c for c in " ".join(name.split()) if c.isprintable())[:MAX_NAME].strip() or "document"
