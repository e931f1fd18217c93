"""Files of a model folder: read within bounds, and named for what they are when they are not what they should be."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_JSON = 16 << 20  # bytes; the index of 235B parameters has 4 MiB, the header of one file less
AGAIN = "download it again"
CONVERT = (
    "convert it with transformers: AutoModelForCausalLM.from_pretrained(OLD, dtype='auto').save_pretrained(NEW), "
    "and name the folder NEW"
)
ORIGINAL = "use the safetensors checkpoint in bfloat16 that it was made from"
_SIGNATURES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull in its folder"),
    (b"<!doctype html", f"a web page, not the file itself: {AGAIN}, signed in if the model asks for it"),
    (b"<html", f"a web page, not the file itself: {AGAIN}, signed in if the model asks for it"),
    (b"gguf", "a GGUF file under another name: let its name end in .gguf"),
    (b"pk\x03\x04", f"a PyTorch file under another name: {CONVERT}"),
)


def is_gguf(path: Path) -> bool:
    """Return whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def shown(value: object, limit: int = 120) -> str:
    """Return a value of a file, such as a name, as printable text of at most `limit` characters."""
    text = value if isinstance(value, str) and value[: limit + 1].isprintable() else ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def what_it_is(head: bytes) -> str | None:
    """Return what a file is that begins with `head`, with the way out, None when that is not known."""
    start = head.lstrip()[:64].lower()
    for signature, words in _SIGNATURES:
        if start.startswith(signature):
            return words
    return f"begins with zeros, so its download was not finished: {AGAIN}" if head and not any(head) else None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read. Raises OSError for anything else, such as a pipe, without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read_bounded(path: Path, limit: int = MAX_JSON) -> bytes:
    """Return the bytes of a regular file. Raises OSError, also for a file of more than `limit` bytes."""
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes: at most {limit} are read", str(path))
        return handle.read(limit)
