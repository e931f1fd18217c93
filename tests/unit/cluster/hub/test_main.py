"""The downloading process: room on the disk, and the bytes that it counts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.hub.__main__ import check_room, download, stored_bytes
from cluster.hub.names import HubError, HubName

NAME = HubName("huggingface", "org/tiny")


class FakeRepository:
    """A repository of two files, one of which is there already."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.fetched: list[str] = []

    def sizes(self) -> dict[str, int]:
        return {"config.json": 2, "model.safetensors": 1000, "README.md": 1 << 60, "t-Q8_0.gguf": 500}

    def has(self, file: str) -> bool:
        return file == "config.json"

    def fetch(self, files: Sequence[str]) -> Path:
        self.fetched += files
        return self.root / "snapshot"


def test_what_is_needed_is_fetched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    repository = FakeRepository(tmp_path)
    assert download(NAME, "weights", repository) == tmp_path / "snapshot"
    assert repository.fetched == ["config.json", "model.safetensors"]
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first == {"phase": "looking up org/tiny", "done": 0, "total": 0}
    file = HubName("huggingface", "org/tiny", None, "Q8_0")
    assert download(file, "weights", FakeRepository(tmp_path)) == tmp_path / "snapshot" / "t-Q8_0.gguf"


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=999))
    root = tmp_path / "not" / "there"
    check_room(NAME, root, 999)
    for hub, variable in (("huggingface", "HF_HUB_CACHE"), ("modelscope", "MODELSCOPE_CACHE")):
        with pytest.raises(HubError) as caught:
            check_room(HubName(hub, "org/tiny"), root, 1 << 30)  # type: ignore[arg-type]
        assert f"1GiB are to be downloaded into {root}, whose disk has 999B free" in str(caught.value)
        assert f"let {variable} name a folder on another disk" in str(caught.value)
    repository = FakeRepository(tmp_path)
    with pytest.raises(HubError):
        download(NAME, "weights", repository)
    assert repository.fetched == []


def test_bytes_of_a_folder(tmp_path: Path):
    assert stored_bytes(tmp_path / "absent") == 0
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a.1234abcd.incomplete").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"12")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert stored_bytes(tmp_path) == 5
