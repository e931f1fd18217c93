"""Writes files past the page cache: it would take memory, and time of the processor, for what is read much later.

Where a file system cannot do that, files are written as usual.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading

ALIGNMENT = 4096  # of offset, size and memory of each write
BUFFER_BYTES = 1 << 20
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_buffers = threading.local()  # memory that was used before costs nothing


class DirectFile:
    """An empty file that is written from the front to the back, but for its first bytes, which come last."""

    def __init__(self, descriptor: int, first: int) -> None:
        """
        Args:
            first: how many bytes come last.
        """
        self._descriptor = descriptor
        self._first_bytes = first
        self._first = _buffer("first", -(-first // ALIGNMENT) * ALIGNMENT)  # with the bytes up to the next alignment
        self._size = first
        self._buffer = _buffer("rest", BUFFER_BYTES)
        self._written = len(self._first)  # whatever is below is in the file, or in `_first`
        _set_direct(descriptor, True)

    def append(self, data: memoryview) -> None:
        """Write the next bytes. Raises OSError."""
        while data:
            if self._size < len(self._first):
                place = self._first[self._size :]
            else:
                place = self._buffer[self._size - self._written :]
            count = min(len(place), len(data))
            place[:count] = data[:count]
            data, self._size = data[count:], self._size + count
            if self._size - self._written == BUFFER_BYTES:
                self._write(self._buffer, self._written)
                self._written = self._size

    def finish(self, first: bytes) -> int:
        """Write what is left, at last the first bytes; returns the size of the file. Raises OSError."""
        assert len(first) == self._first_bytes
        self._first[: len(first)] = first
        if (left := self._size - self._written) > 0:
            self._write(self._buffer[: -(-left // ALIGNMENT) * ALIGNMENT], self._written)
        self._write(self._first, 0)
        if self._size % ALIGNMENT:
            os.ftruncate(self._descriptor, self._size)
        return self._size

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                written = os.pwrite(self._descriptor, data, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not _set_direct(self._descriptor, False):
                    raise
                continue
            data, offset = data[written:], offset + written


def _set_direct(descriptor: int, is_direct: bool) -> bool:
    """Return whether that changes anything."""
    before = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    after = before | _O_DIRECT if is_direct else before & ~_O_DIRECT
    if after == before:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, after)
    except OSError:  # not on this file system
        return False
    return True


def _buffer(name: str, size: int) -> memoryview:
    """Return memory of this thread whose address is aligned; it holds anything."""
    buffer: memoryview | None = getattr(_buffers, name, None)
    if buffer is None or len(buffer) < size:
        buffer = memoryview(mmap.mmap(-1, size))  # begins at a page
        setattr(_buffers, name, buffer)
    return buffer[:size]
