"""Files written past the page cache have exactly the bytes that they were given."""

import errno
import os
import random

import pytest

from workers.kv import direct_file
from workers.kv.direct_file import ALIGNMENT, BUFFER_BYTES, DirectFile

SIZES = [0, 1, 17, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 67_193, BUFFER_BYTES, BUFFER_BYTES + 17, 3 * BUFFER_BYTES]


def written(path, first, rest, step):
    """Write `rest` in pieces of `step` bytes, then `first`; returns what the file has."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        file = DirectFile(descriptor, len(first))
        for at in range(0, len(rest), step):
            file.append(memoryview(rest)[at : at + step])
        assert file.finish(first) == len(first) + len(rest)
    finally:
        os.close(descriptor)
    return path.read_bytes()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first_size", [1, 193, ALIGNMENT, ALIGNMENT + 67])
def test_has_the_bytes_given(tmp_path, size, first_size):
    rng = random.Random(size * 7 + first_size)
    first, rest = rng.randbytes(first_size), rng.randbytes(size)
    step = rng.choice([193, 67_000, BUFFER_BYTES, 2 * BUFFER_BYTES + 1]) if size > 1000 else 17
    assert written(tmp_path / "file", first, rest, step) == first + rest


def test_where_the_page_cache_cannot_be_left_out(tmp_path, monkeypatch):
    rest = random.Random(1).randbytes(BUFFER_BYTES + 193)
    monkeypatch.setattr(direct_file, "_set_direct", lambda descriptor, is_direct: False)
    assert written(tmp_path / "file", b"first", rest, 4096) == b"first" + rest


def test_a_refused_alignment_is_written_as_usual(tmp_path, monkeypatch):
    pwrite, refused, modes = os.pwrite, [], []

    def strict(descriptor, data, offset):
        if not refused:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, data, offset)

    def set_direct(descriptor, is_direct):
        modes.append(is_direct)
        return True

    monkeypatch.setattr(direct_file, "_set_direct", set_direct)
    monkeypatch.setattr(os, "pwrite", strict)
    rest = random.Random(2).randbytes(BUFFER_BYTES + 193)
    assert written(tmp_path / "file", b"first", rest, 4096) == b"first" + rest
    assert modes == [True, False]


def test_writes_that_are_cut_short_go_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:ALIGNMENT], offset))
    rest = random.Random(3).randbytes(5 * ALIGNMENT + 193)
    assert written(tmp_path / "file", b"first", rest, 4096) == b"first" + rest


def test_errors_of_the_disk_are_raised(tmp_path, monkeypatch):
    def full(descriptor, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space") as raised:
        written(tmp_path / "file", b"first", b"rest", 4096)
    assert raised.value.errno == errno.ENOSPC
