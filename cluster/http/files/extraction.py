"""The text of files that clients send: taken out by the same code as in our own client, in a limited child process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from cluster.client.ingest.conversion import ConversionLimits
from cluster.client.ingest.source import DocumentText, file_kind, read_file
from cluster.jobs.documents import display_name
from cluster.jobs.model import ServiceBusy
from protos.errors import InvalidRequest

_LIMITS = ConversionLimits(seconds=120.0, memory_bytes=2 << 30)  # the head has other work, too
_AT_A_TIME, _WAIT_S = 2, 5.0
_HEAD_BYTES = 1024
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
    shown = display_name(name)
    is_text = not file_kind(Path(shown), file.read(_HEAD_BYTES))
    file.seek(0)
    with nullcontext() if is_text else _turn(where):
        try:
            return read_file(file, shown, limits=_LIMITS)
        except InvalidRequest as error:
            raise InvalidRequest(f"{where}: {shown}: {error}") from error


@contextmanager
def _turn(where: str) -> Iterator[None]:
    if not _turns.acquire(timeout=_WAIT_S):
        raise ServiceBusy(f"{where}: {_AT_A_TIME} other files have been read for {_WAIT_S:g} s: try again", 10.0)
    try:
        yield
    finally:
        _turns.release()
