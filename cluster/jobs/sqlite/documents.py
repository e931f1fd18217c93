"""The tables of documents: their records, and which blocks of stored KV belong to them."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, fields

from cluster.jobs.document.token_file import HEAD_BYTES
from cluster.jobs.model import ACTIVE, SCALE_TO_COME, DocumentRecord, NotAllowedNow
from cluster.jobs.sqlite import statements
from cluster.jobs.sqlite.batches import ENDED
from cluster.jobs.sqlite.database import Database
from protos.jobs.limits import MAX_INT64

_ENDED_BATCHES = ", ".join(f"'{status}'" for status in sorted(ENDED))
_IN_USE = (
    "(EXISTS (SELECT 1 FROM jobs WHERE document_id = documents.id AND state IN (SELECT value FROM json_each(?)))"
    f" OR id IN (SELECT input FROM batches WHERE status NOT IN ({_ENDED_BATCHES})))"
)
_ORPHANS = (
    "SELECT DISTINCT key FROM document_kv AS orphan WHERE NOT EXISTS"
    " (SELECT 1 FROM document_kv JOIN documents ON documents.id = document_id WHERE key = orphan.key) LIMIT ?"
)
_MOST_ORPHANS = 10_000  # at a time


def touch(db: sqlite3.Connection, document_id: str, expires: float | None, now: float) -> bool:
    """Note a use of a document, which expires then if it is not pinned; False if there is no such document."""
    query = (
        "UPDATE documents SET expires = CASE WHEN pinned THEN 0 ELSE coalesce(?, expires) END, used = ? WHERE id = ?"
    )
    return db.execute(query, (expires, now, document_id)).rowcount > 0


class DocumentTable:
    """The documents of a job store; all methods may be called from any thread, each is one transaction."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._db = database
        self._clock = clock

    def put_document(self, record: DocumentRecord) -> DocumentRecord:
        """Add a document, or renew the expiry of the one with this id; returns what is stored.

        A source, and a length scale that is more than to come, stay as they are; a pinned document stays pinned. The
        purpose is the newest.
        """
        values = astuple(record)
        marks = ", ".join("?" * len(fields(DocumentRecord)))
        with self._db.writing() as db:
            db.execute(
                f"INSERT INTO documents ({statements.columns(DocumentRecord)}) VALUES ({marks})"
                " ON CONFLICT (id) DO UPDATE SET size_bytes = excluded.size_bytes, used = excluded.used,"
                " pinned = pinned OR excluded.pinned, seams = excluded.seams, shared = shared OR excluded.shared,"
                " purpose = excluded.purpose,"
                " expires = CASE WHEN pinned OR excluded.pinned THEN 0 ELSE excluded.expires END,"
                " scale_len = CASE WHEN scale_len = 0 OR scale_len < 0 AND excluded.scale_len > 0"
                " THEN excluded.scale_len ELSE scale_len END,"
                " source_hash = CASE WHEN source_hash = '' THEN excluded.source_hash ELSE source_hash END",
                (*values[:-1], json.dumps(record.seams)),
            )
            return statements.documents(db, "WHERE id = ?", record.id)[0]

    def get_document(self, document_id: str) -> DocumentRecord | None:
        with self._db.reading() as db:
            return next(iter(statements.documents(db, "WHERE id = ?", document_id)), None)

    def touch_document(self, document_id: str, expires: float) -> bool:
        """Note a use and the new expiry; False if there is no such document."""
        with self._db.writing() as db:
            return touch(db, document_id, expires, self._clock())

    def pin_document(self, document_id: str, pinned: bool, expires: float) -> bool:
        """Keep a document until it is unpinned or deleted, or let it expire; False if there is none."""
        with self._db.writing() as db:
            query = "UPDATE documents SET pinned = ?, expires = ? WHERE id = ?"
            return db.execute(query, (pinned, 0.0 if pinned else expires, document_id)).rowcount > 0

    def count_document(self, document_id: str, tokens: int, scale_len: int) -> None:
        """Note how many tokens a document has, and the length of its scale if that waits for it."""
        with self._db.writing() as db:
            db.execute(
                "UPDATE documents SET tokens = ?, scale_len = CASE WHEN scale_len = ? THEN ? ELSE scale_len END"
                " WHERE id = ?",
                (tokens, SCALE_TO_COME, scale_len, document_id),
            )

    def list_documents(self, limit: int = MAX_INT64, owner: str | None = None) -> list[DocumentRecord]:
        """Return the newest `limit` documents that an owner sees, or (None) of all, newest first."""
        with self._db.reading() as db:
            where = "WHERE ?1 IS NULL OR owner = ?1 OR shared ORDER BY created DESC, rowid DESC LIMIT ?2"
            return statements.documents(db, where, owner, limit)

    def page_documents(
        self,
        limit: int,
        after: str = "",
        purpose: str | None = None,
        newest_first: bool = True,
        owner: str | None = None,
    ) -> list[DocumentRecord]:
        """Return documents in the order in which they were added, those behind `after` (an id).

        Args:
            purpose: None for any.
            owner: who sees them; None: all.
        """
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        where, values = ["TRUE"], []
        if owner is not None:
            where.append("(owner = ? OR shared)")
            values.append(owner)
        if after:
            where.append(f"(created, rowid) {beyond} (SELECT created, rowid FROM documents WHERE id = ?)")
            values.append(after)
        if purpose is not None:
            where.append("purpose = ?")
            values.append(purpose)
        with self._db.reading() as db:
            rest = f"WHERE {' AND '.join(where)} ORDER BY created {order}, rowid {order} LIMIT ?"
            return statements.documents(db, rest, *values, limit)

    def uncounted_documents(self, limit: int) -> list[str]:
        """Return ids of documents whose tokens are not counted, the newest first."""
        with self._db.reading() as db:
            query = "SELECT id FROM documents WHERE tokens = 0 AND purpose = '' ORDER BY created DESC LIMIT ?"
            return [document_id for (document_id,) in db.execute(query, (limit,))]

    def document_ids(self) -> set[str]:
        """Return the ids of all documents."""
        with self._db.reading() as db:
            return {document_id for (document_id,) in db.execute("SELECT id FROM documents")}

    def documents_size(self, owner: str | None = None) -> int:
        """Return the bytes that the documents of an owner, or (None) all, take on disk together, with their token ids,
        each in whole blocks.
        """
        with self._db.reading() as db:
            ids = f"CASE WHEN tokens THEN ({HEAD_BYTES} + 4 * tokens + 4095) / 4096 * 4096 ELSE 0 END"
            query = f"SELECT coalesce(sum((size_bytes + 4095) / 4096 * 4096 + {ids}), 0) FROM documents"
            return int(db.execute(f"{query} WHERE ?1 IS NULL OR owner = ?1", (owner,)).fetchone()[0])

    def delete_document(self, document_id: str) -> bool:
        """Delete the record; False if there is none. Raises NotAllowedNow while an unfinished job uses it."""
        with self._db.writing() as db:
            if statements.documents(db, f"WHERE id = ? AND {_IN_USE}", document_id, statements.array(ACTIVE)):
                raise NotAllowedNow(
                    f"document: {document_id}: an unfinished job uses it, or a batch: wait or cancel it"
                )
            return db.execute("DELETE FROM documents WHERE id = ?", (document_id,)).rowcount > 0

    def expire_documents(self, now: float) -> int:
        """Delete the records whose expiry has passed and that no unfinished job uses; returns how many."""
        with self._db.writing() as db:
            query = f"DELETE FROM documents WHERE expires <= ? AND NOT pinned AND NOT {_IN_USE}"
            return db.execute(query, (now, statements.array(ACTIVE))).rowcount

    # --- stored KV ---------------------------------------------------------------------------------------------------

    def add_kv(self, document_id: str, pinned_len: int, keys: Iterable[bytes]) -> bool:
        """Note blocks of a document before they are stored; False, and nothing is noted, if it is gone.

        Args:
            pinned_len: length that decides about their length scale.
        """
        with self._db.writing() as db:
            if not db.execute("SELECT 1 FROM documents WHERE id = ?", (document_id,)).fetchone():
                return False
            self._note_kv(db, document_id, pinned_len, keys)
            return True

    def hold_kv(self, name: str, pinned_len: int, keys: Iterable[bytes]) -> None:
        """Note blocks under a name that no document has yet; until one has it, they are those of no document."""
        with self._db.writing() as db:
            self._note_kv(db, name, pinned_len, keys)

    def release_kv(self, name: str, keys: Iterable[bytes]) -> None:
        """Note blocks as `hold_kv` does, as far as no other name has them."""
        with self._db.writing() as db:
            self._note_kv(db, name, 0, keys)
            others = "SELECT 1 FROM document_kv AS other WHERE other.key = document_kv.key AND other.document_id != ?1"
            db.execute(f"DELETE FROM document_kv WHERE document_id = ?1 AND EXISTS ({others})", (name,))

    @staticmethod
    def _note_kv(db: sqlite3.Connection, name: str, pinned_len: int, keys: Iterable[bytes]) -> None:
        query = "INSERT OR IGNORE INTO document_kv (document_id, key, pinned_len) VALUES (?, ?, ?)"
        db.executemany(query, ((name, key, pinned_len) for key in keys))

    def remove_kv(self, keys: Iterable[bytes]) -> None:
        """Note that blocks are not stored any more."""
        with self._db.writing() as db:
            db.executemany("DELETE FROM document_kv WHERE key = ?", ((key,) for key in keys))

    def document_kv(self, document_ids: Sequence[str]) -> dict[str, dict[bytes, int]]:
        """Return the blocks of documents that may be stored, with their `pinned_len`; without documents of none."""
        found: dict[str, dict[bytes, int]] = {}
        with self._db.reading() as db:
            query = (
                "SELECT document_id, key, pinned_len FROM document_kv"
                " WHERE document_id IN (SELECT value FROM json_each(?))"
            )
            for document_id, key, pinned_len in db.execute(query, (json.dumps(document_ids),)):
                found.setdefault(document_id, {})[key] = pinned_len
        return found

    def pinned_kv(self) -> frozenset[bytes]:
        """Return the keys of the blocks of pinned documents."""
        with self._db.reading() as db:
            query = "SELECT DISTINCT key FROM document_kv JOIN documents ON documents.id = document_id WHERE pinned"
            return frozenset(key for (key,) in db.execute(query))

    def orphan_kv(self) -> list[bytes]:
        """Return keys of stored blocks whose documents are all gone, some of them if there are many."""
        with self._db.reading() as db:
            return [key for (key,) in db.execute(_ORPHANS, (_MOST_ORPHANS,))]
