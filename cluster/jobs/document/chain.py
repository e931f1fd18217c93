"""Ids of documents: a hash of their bytes, and of the id of the document that they were appended to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence


class ChainDigest:
    """The ids of all documents that a content was appended together from, while it arrives.

    Args:
        seams: offsets of what was appended.
    """

    def __init__(self, seams: Sequence[int]) -> None:
        self._seams = list(seams)
        self._digest = digest_after("")
        self._size = 0
        self.ids: list[str] = []  # of the parts that are complete

    def update(self, piece: bytes | memoryview) -> None:
        rest = memoryview(piece)
        while len(self.ids) < len(self._seams) and self._size + len(rest) >= self._seams[len(self.ids)]:
            end = self._seams[len(self.ids)] - self._size
            self._digest.update(rest[:end])
            self._size, rest = self._size + end, rest[end:]
            self.ids.append(self.document_id)
            self._digest = digest_after(self.ids[-1])
        self._digest.update(rest)
        self._size += len(rest)

    @property
    def document_id(self) -> str:
        """The id of what has arrived."""
        return id_of(self._digest)


def chain_ids(content: bytes, seams: Sequence[int]) -> list[str]:
    """Return the ids of all documents that a content was appended together from; the last one is its own."""
    chain = ChainDigest(seams)
    chain.update(content)
    return [*chain.ids, chain.document_id]


def digest_after(document_id: str) -> hashlib._Hash:
    """Return the hash to which the bytes of a document are added, after those of another one."""
    return hashlib.sha256(f"{document_id}\n".encode() if document_id else b"")


def id_of(digest: hashlib._Hash) -> str:
    """Return the id of a document from the SHA-256 of its bytes."""
    return f"doc_{digest.hexdigest()[:32]}"
