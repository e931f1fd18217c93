"""What is no file is not opened, and nothing is followed or waited for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workers.kv.open_file import BadBlock, open_file, read_ahead


@pytest.fixture
def others(tmp_path: Path) -> list[Path]:
    """A folder, a link, a pipe."""
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    return [tmp_path / name for name in ("folder", "link", "pipe")]


def test_only_files_are_opened(others: list[Path], tmp_path: Path) -> None:
    descriptor = open_file(tmp_path / "file")
    assert os.read(descriptor, 100) == b"content"
    os.close(descriptor)
    for path in others:
        with pytest.raises(BadBlock):
            open_file(path)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "file" / "none")


def test_files_are_read_ahead_and_nothing_else(
    others: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hinted = list[tuple[str, int, int, int]]()
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, *rest: hinted.append((os.readlink(f"/proc/self/fd/{fd}"), *rest))
    )
    before = len(os.listdir("/proc/self/fd"))
    read_ahead([*others, tmp_path / "none", tmp_path / "file"])
    assert hinted == [(str(tmp_path / "file"), 0, 0, os.POSIX_FADV_WILLNEED)]
    assert len(os.listdir("/proc/self/fd")) == before
    monkeypatch.delattr(os, "posix_fadvise")
    read_ahead([tmp_path / "file"])
    assert len(hinted) == 1
