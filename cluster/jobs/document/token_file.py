"""The token ids of a document, in a file beside its text: an array of uint32, what it was made by, and a checksum."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_MAGIC = b"LRTOKEN1"
_DIGEST = 32
HEAD_BYTES = len(_MAGIC) + 2 * _DIGEST  # before the ids, of 4 bytes each
SUFFIX = ".ids"
TEMPORARY = ".upload-ids-"  # of files that are being written; the next start removes them


def tokens_path(text: Path) -> Path:
    """Return where the ids of a stored text are."""
    return text.with_name(text.name + SUFFIX)


def write_tokens(path: Path, fingerprint: bytes, ids: Sequence[int]) -> None:
    """Store ids with mode 0600, as a whole or not at all.

    Args:
        fingerprint: 32 bytes: of the tokenizer, the place, and the document.

    Raises OSError.
    """
    payload = _bytes(array("I", ids))
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + fingerprint + _checksum(fingerprint, payload) + payload)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def read_tokens(path: Path, fingerprint: bytes) -> array[int] | None:
    """Return the ids; None: there is no file, it is damaged, or of another tokenizer or document."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read()
    except OSError:
        return None
    head = _MAGIC + fingerprint
    payload = memoryview(data)[len(head) + _DIGEST :]
    if not data.startswith(head) or len(payload) % 4 or not len(payload):
        return None
    if data[len(head) : len(head) + _DIGEST] != _checksum(fingerprint, payload):
        return None
    ids = array("I")
    ids.frombytes(payload)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids


def _checksum(fingerprint: bytes, payload: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(fingerprint)
    digest.update(payload)
    return digest.digest()


def _bytes(ids: array[int]) -> bytes:
    assert ids.itemsize == 4
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tobytes()
