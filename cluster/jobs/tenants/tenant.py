"""Who owns jobs and documents: the name of an API key."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.jobs.model import DocumentRecord


@dataclass(frozen=True, slots=True)
class Tenant:
    """All keys of one name.

    Attributes:
        name: empty where a head has no keys: then there is one tenant, who sees what any key has left, too.
        is_admin: sees and may change what others own.
        max_streams: calls that may last for hours, open at a time; None: no limit of its own. So for the others:
        max_queued_jobs: jobs that wait.
        max_document_bytes: bytes on disk of all its documents.
    """

    name: str = ""
    is_admin: bool = False
    max_streams: int | None = None
    max_queued_jobs: int | None = None
    max_document_bytes: int | None = None

    def sees(self, owner: str | None) -> bool:
        """Return whether it sees what `owner` owns (None: nobody, there is no such thing)."""
        return self.is_admin or owner == self.name


ANYONE = Tenant(is_admin=True)  # of a head without keys


def owned_id(owner: str, document_id: str) -> str:
    """Return the id of a document of an owner, from the one that its content has.

    The same text is another document for each owner, so nothing that is known of one shows in another.
    """
    if not owner:
        return document_id
    digest = hashlib.sha256(f"{owner}\n{document_id}".encode())
    return f"doc_{digest.hexdigest()[:32]}"


def kv_owner_of(document: DocumentRecord) -> str:
    """Return whose the KV of a document is: of its owner, or everybody's ("") where it is shared."""
    return "" if document.shared else document.owner


def cache_salt(owner: str, salt: str = "") -> str:
    """Return what keeps the KV of an owner ("" for everybody's) from all other.

    Args:
        salt: what a request asked for. Names have no line breaks, so it is never taken for another owner.
    """
    return f"{owner}\n{salt}" if salt else owner
