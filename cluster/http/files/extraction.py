"""The text of files that clients send: taken out by the same code as in our own client, in a limited child process."""

from __future__ import annotations

import threading
from typing import BinaryIO

from cluster.client.ingest.conversion import ConversionLimits
from cluster.client.ingest.source import DocumentText, read_file
from cluster.jobs.documents import display_name
from cluster.jobs.model import ServiceBusy
from protos.errors import InvalidRequest

_LIMITS = ConversionLimits(seconds=120.0, memory_bytes=2 << 30)  # the head has other work, too
_AT_A_TIME, _WAIT_S = 2, 60.0
_turns = threading.BoundedSemaphore(_AT_A_TIME)


def file_text(where: str, file: BinaryIO, name: str) -> DocumentText:
    """Return the text of a file.

    Args:
        where: field of the request, for errors.
        file: a real file, at its beginning.
        name: as the client has it.

    Raises:
        InvalidRequest: it has no text, is damaged, encrypted, too large, or a package that reads it is not installed.
        ServiceBusy: other files are being read.
    """
    if not _turns.acquire(timeout=_WAIT_S):
        raise ServiceBusy(f"{where}: {_AT_A_TIME} other files have been read for {_WAIT_S:g} s: try again", 5.0)
    try:
        return read_file(file, display_name(name), limits=_LIMITS)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {display_name(name)}: {error}") from error
    finally:
        _turns.release()
