"""Files as a whole: disks that take a part at a time, and names that are no files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.jobs.document.disk import read_file, sync_folder, write_all


def test_all_is_written_though_the_disk_takes_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:3]))
    with (tmp_path / "a").open("wb") as file:
        write_all(file.fileno(), b"some words")
    sync_folder(tmp_path)
    assert read_file(tmp_path / "a", 10) == b"some words"
    assert read_file(tmp_path / "a", 4) == b"some "


def test_a_pipe_is_no_file_and_holds_nobody_up(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        read_file(tmp_path / "pipe", 4)
