"""What counts as left behind."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.bench.cycles import Leftovers


def test_new_files_processes_and_descriptors_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = Leftovers.now()
    (tmp_path / "session").mkdir()
    (tmp_path / "session" / "log").touch()
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout is not None
        child.stdout.read(1)
        left = Leftovers.now().more_than(before)
    finally:
        child.kill()
        child.communicate()
    assert left["temporary"] == [str(tmp_path / "session"), str(tmp_path / "session" / "log")]
    assert any(entry.startswith(f"{child.pid} ") for entry in left["processes"])
    assert not any(entry.startswith(f"{os.getpid()} ") for entry in left["processes"])


def test_what_was_there_before_is_not_left():
    before = Leftovers(frozenset({"a", "b"}), frozenset({"m"}), frozenset({"1 init"}), 10)
    after = Leftovers(frozenset({"b", "c"}), frozenset(), frozenset({"1 init", "2 ray"}), 12)
    assert after.more_than(before) == {
        "temporary": ["c"],
        "shared_memory": [],
        "processes": ["2 ray"],
        "descriptors": 2,
    }
