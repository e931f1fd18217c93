"""Files of token ids: private, whole, and refused when they are damaged or of something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.jobs.document.token_file import HEAD_BYTES, read_tokens, tokens_path, write_tokens

MINE, OTHER = b"m" * 32, b"o" * 32


@pytest.mark.parametrize("count", [1, 17, 67, 193])
def test_ids_come_back(tmp_path: Path, count: int) -> None:
    path = tokens_path(tmp_path / "doc_1")
    ids = [(index * 7919) % (1 << 32) for index in range(count - 1)] + [(1 << 32) - 1]
    write_tokens(path, MINE, ids)
    assert list(read_tokens(path, MINE) or ()) == ids
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["doc_1.ids"]
    assert read_tokens(path, OTHER) is None


def test_every_damaged_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ids"
    write_tokens(path, MINE, [1, 2, 3])
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert read_tokens(path, MINE) is None
        path.write_bytes(whole[:at])
        assert read_tokens(path, MINE) is None
    path.write_bytes(whole + b"1234")
    assert read_tokens(path, MINE) is None
    path.unlink()
    assert read_tokens(path, MINE) is None
    path.mkdir()
    assert read_tokens(path, MINE) is None


def test_a_file_has_the_size_that_is_counted(tmp_path: Path) -> None:
    write_tokens(tmp_path / "a.ids", b"f" * 32, [1] * 1006)
    assert (tmp_path / "a.ids").stat().st_size == HEAD_BYTES + 4 * 1006 == 4096
