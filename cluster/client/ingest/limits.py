"""How much is taken in: a source that would be no document, or fill the memory, is refused on the way."""

from __future__ import annotations

from protos.errors import InvalidRequest

MAX_BYTES = 256 << 20  # of a file of text, and of the text of one document; a million tokens are some megabytes
MAX_FILES = 200_000
MAX_RATIO = 250  # unpacked over packed bytes; text is seldom above 20
RATIO_FROM = 16 << 20  # bytes below which no ratio is too much


class Budget:
    """Counts files and bytes as they are read. Raises InvalidRequest when they are too many."""

    def __init__(self, packed_bytes: int | None = None, max_bytes: int = MAX_BYTES, max_files: int = MAX_FILES) -> None:
        """Begin at 0.

        Args:
            packed_bytes: size of the archive that is unpacked, if it is one.
        """
        self._max_bytes = max_bytes
        self._max_files = max_files
        self._most_unpacked = None if packed_bytes is None else max(RATIO_FROM, packed_bytes * MAX_RATIO)
        self._files = self._bytes = self._held = 0

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return self._max_bytes - self._bytes

    def add_file(self) -> None:
        """Count a file."""
        self._files += 1
        if self._files > self._max_files:
            raise InvalidRequest(f"has more than {self._max_files:,} files: leave some out by .gitignore")

    def spend(self, size: int) -> None:
        """Count bytes."""
        self._bytes += size
        if self._bytes > self._max_bytes:
            raise InvalidRequest(f"has more than {self._max_bytes >> 20} MiB of text: leave some out")
        self.check_unpacked(self._bytes)

    def hold(self, size: int) -> None:
        """Count bytes that are kept in memory before they are read."""
        self._held += size
        if self._held > self._max_bytes:
            raise InvalidRequest(f"has more than {self._max_bytes >> 20} MiB of text: leave some out")

    def check_unpacked(self, size: int) -> None:
        """Refuse an archive of which this many bytes come out in all."""
        if self._most_unpacked is not None and size > self._most_unpacked:
            raise InvalidRequest(f"unpacks to more than {MAX_RATIO} times its size: no text is packed like this")
