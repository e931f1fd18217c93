"""Files with secrets: who may read and replace them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.common.errors import PreflightError
from cluster.common.secret_files import read_public, read_secret
from tests.support.fakes.jobs_api import write_secret


def write(folder: Path, mode: int = 0o600) -> Path:
    return write_secret(folder / "keys", "secret", mode)


@pytest.mark.parametrize(("mode", "ok"), [(0o600, True), (0o400, True), (0o640, True), (0o644, False), (0o602, False)])
def test_the_file_must_not_be_open_to_others(tmp_path: Path, mode: int, ok: bool) -> None:
    path = write(tmp_path, mode)
    if ok:
        assert read_secret("key", path) == b"secret"
    else:
        with pytest.raises(PreflightError, match=f"mode {mode:o}: must not be open to others; chmod 600"):
            read_secret("key", path)


@pytest.mark.parametrize("is_link", [False, True])
def test_others_must_not_be_able_to_replace_the_file(tmp_path: Path, is_link: bool) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    path = write(folder)
    if is_link:
        path = tmp_path / "link"
        path.symlink_to(folder / "keys")
    folder.chmod(0o1777)  # as /tmp: nobody may rename what is another's
    assert read_secret("key", path) == b"secret"
    folder.chmod(0o777)
    with pytest.raises(PreflightError, match=f"mode 777 of {folder}: others could replace the file; chmod o-w"):
        read_secret("key", path)


def test_a_link_counts_as_its_file(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(write(tmp_path, 0o644))
    with pytest.raises(PreflightError, match="mode 644"):
        read_secret("key", link)


def test_a_pipe_is_no_keys_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(PreflightError, match="cannot be read: must be a regular file"):
        read_secret("key", pipe)


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(PreflightError, match=r"^key: .*: cannot be read"):
            read_secret("key", path)


def test_what_is_public_may_be_open(tmp_path: Path) -> None:
    assert read_public("certificate", write(tmp_path, 0o644)) == b"secret"
