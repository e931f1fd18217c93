"""Files in messages, as text: stored documents by their ids, or content that comes with the request."""

from __future__ import annotations

import base64
import binascii
import tempfile
from dataclasses import dataclass
from typing import Protocol

from cluster.client.ingest.tree import section, show_path
from cluster.http.core.errors import TOO_LONG, refuse
from cluster.http.files.extraction import file_text
from cluster.jobs.model import DocumentRecord, check_id
from protos.jobs.limits import MAX_REQUEST_BYTES
from protos.jobs.validate import check_text

_SPOOL_BYTES = 8 << 20
_FILE = "file-"


def document_id(file_id: str) -> str:
    """Return the id of the document that a file is: `file-` and `doc_` are followed by the same digits."""
    return f"doc_{file_id.removeprefix(_FILE)}" if file_id.startswith(_FILE) else file_id


def file_id(document_id: str) -> str:
    """Return the id of a document as a file."""
    return f"{_FILE}{document_id.removeprefix('doc_')}"


class Documents(Protocol):
    """The stored documents that a client may see; see `DocumentStore`."""

    def get(self, document_id: str) -> DocumentRecord: ...

    def read(self, document_id: str) -> bytes: ...


class Attachments:
    """Reads the files of one request, which may have so many bytes of text together. Raises as `Attachment.read`."""

    def __init__(self, documents: Documents) -> None:
        """
        Args:
            documents: those that the client may see.
        """
        self._documents = documents
        self._left = MAX_REQUEST_BYTES

    def text(self, attachment: Attachment) -> str:
        """Return the text of a file under a header with its name, as it stands in the message."""
        name, text = attachment.read(self._documents, self._left)
        self._left -= len(text.encode())
        if self._left < 0:
            raise refuse(attachment.where, f"more than {MAX_REQUEST_BYTES} bytes of text in all files", TOO_LONG)
        return section(show_path([name.encode("utf-8", "replace")]), text)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file of a message: `id` of a stored one, or its content: `data` in base64, a data URL or not, or `text`.

    `where` is the field of the request that it is in.
    """

    where: str
    name: str = ""
    id: str = ""
    data: str = ""
    text: str = ""

    def read(self, documents: Documents, max_bytes: int = MAX_REQUEST_BYTES) -> tuple[str, str]:
        """Return name and text; blocks.

        Args:
            max_bytes: a stored document with more is not read.

        Raises:
            ApiError: no content, no base64, or too many bytes. InvalidRequest: it has no text. JobNotFound,
                DocumentDamaged, ServiceBusy: the document cannot be read (now).
        """
        if self.id:
            record = documents.get(check_id(document_id(self.id), "doc"))
            if record.size_bytes > max_bytes:
                raise refuse(self.where, f"more than {MAX_REQUEST_BYTES} bytes of text in all files", TOO_LONG)
            return self.name or record.name, documents.read(record.id).decode(errors="replace")
        name = self.name or "document"
        if self.text:
            return name, check_text(self.where, self.text)
        if not self.data:
            raise refuse(self.where, "(missing): must be the id of a stored file, or its content", "unsupported_value")
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as file:
            file.write(self._decoded())
            file.seek(0)
            return name, file_text(self.where, file, name).data.decode()  # type: ignore[arg-type]

    def _decoded(self) -> bytes:
        encoded = self.data.partition(",")[2] if self.data.startswith("data:") else self.data
        try:
            return base64.b64decode("".join(encoded.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise refuse(self.where, f"must be base64: {error}") from error
