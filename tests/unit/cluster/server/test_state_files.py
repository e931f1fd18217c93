"""The files of a head and who may claim them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.client.connection import read_state
from cluster.server.state_files import HeadFiles, _is_head, reachable


@pytest.mark.parametrize(
    ("command", "ours"),
    [
        (["python", "-m", "cluster.cli", "serve", "c.yaml"], True),
        (["/venv/bin/python", "/venv/bin/longreach", "serve", "c.yaml"], True),
        (["longreach", "up", "c.yaml"], False),
        (["vim", "serve", "cluster.cli"], False),
        (["python", "-m", "http.server"], False),
        ([], False),
    ],
)
def test_command_lines_of_a_head(command: list[str], ours: bool) -> None:
    assert _is_head(command) == ours


def test_head_files(tmp_path: Path) -> None:
    files = HeadFiles(tmp_path / "new")
    assert not files.is_stale()
    files.claim()
    files.announce("[::]:77")
    assert read_state(files.data_dir)["address"] == "[::1]:77"
    assert files.running() is None  # this process is no head
    assert files.is_stale()
    files.release()
    assert not list(files.data_dir.iterdir())
    assert reachable("10.0.0.1:7") == "10.0.0.1:7"
