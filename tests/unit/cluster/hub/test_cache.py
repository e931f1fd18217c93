"""The caches of hubs, read without their libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.hub.cache import cache_folder, cached_model, is_offline
from cluster.hub.names import HubName
from tests.support.hub.cached import cache_entry
from tests.support.hub.stand_in import COMMIT, OTHER_COMMIT

NAME = HubName("huggingface", "org/tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
    return tmp_path / "hf"


def test_the_folders_of_the_libraries(cache: Path):
    assert cache_folder(NAME) == cache
    assert cache_folder(HubName("modelscope", "a/b")) == cache.parent / "scope"


def test_a_snapshot_by_branch_tag_and_commit(cache: Path):
    assert cached_model(NAME) is None
    main = cache_entry(cache, "org/tiny", {"config.json": b"{}"})
    other = cache_entry(cache, "org/tiny", {"config.json": b"{}"}, OTHER_COMMIT, "refs/pr/1")
    for revision, found in ((None, main), ("main", main), (COMMIT, main), ("refs/pr/1", other), (OTHER_COMMIT, other)):
        assert cached_model(HubName("huggingface", "org/tiny", revision)) == found
    assert cached_model(HubName("huggingface", "org/tiny", "v2")) is None
    assert cached_model(HubName("huggingface", "org/other")) is None


def test_a_gguf_file_of_a_snapshot(cache: Path):
    snapshot = cache_entry(cache, "org/tiny", {"t-Q8_0.gguf": b"GGUF", "sub/t-F16.gguf": b"GGUF"})
    for file, found in (
        ("t-Q8_0.gguf", "t-Q8_0.gguf"),
        ("f16", "sub/t-F16.gguf"),
        ("sub/t-F16.gguf", "sub/t-F16.gguf"),
    ):
        assert cached_model(HubName("huggingface", "org/tiny", None, file)) == snapshot / found
    assert cached_model(HubName("huggingface", "org/tiny", None, "q4_0")) is None


def test_a_damaged_entry_is_none(cache: Path):
    cache_entry(cache, "org/tiny", {"config.json": b"{}"})
    (cache / "models--org--tiny" / "refs" / "main").write_bytes(b"\xff\xfe")
    assert cached_model(NAME) is None
    (cache / "models--org--tiny" / "refs" / "main").write_text("../../etc")
    assert cached_model(NAME) is None


def test_both_layouts_of_modelscope(cache: Path):
    name, root = HubName("modelscope", "org/tiny-0.6B"), cache.parent / "scope"
    assert cached_model(name) is None
    new = root / "models" / "org--tiny-0.6B" / "snapshots" / "master"
    new.mkdir(parents=True)
    assert cached_model(name) == new
    (new.parent / "v1").mkdir()
    assert cached_model(HubName("modelscope", "org/tiny-0.6B", "v1")) == new.parent / "v1"
    old = root / "hub" / "models" / "org" / "tiny-0___6B"
    old.mkdir(parents=True)
    assert cached_model(name) == old


def test_offline_is_what_the_library_says(monkeypatch: pytest.MonkeyPatch):
    for value in (True, False):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
        assert is_offline() is value
