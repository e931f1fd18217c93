"""A path goes first, then the cache, then a download; nothing is downloaded that is not needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from cluster.hub import models
from cluster.hub.models import as_named, find_model, local_model, model_argument
from cluster.hub.names import HubError, HubName, Need
from protos.errors import UserError
from tests.support.hub.cached import cache_entry

WHOLE = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}"}
Downloads = list[tuple[str, Need]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hf"


@pytest.fixture
def downloads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Downloads:
    """What was asked of the hub; each download makes a whole snapshot."""
    asked: Downloads = []

    def download(name: HubName, need: Need, on_progress: Callable[[str, int, int], None]) -> Path:
        asked.append((str(name), need))
        on_progress("downloading", 1, 2)
        return cache / "downloaded"

    monkeypatch.setattr(models, "download", download)
    return asked


def refuse(monkeypatch: pytest.MonkeyPatch, problem: str) -> None:
    def download(name: HubName, need: Need, on_progress: object) -> Path:
        raise name.error(problem)

    monkeypatch.setattr(models, "download", download)


def test_a_path_that_exists_goes_first(cache: Path, downloads: Downloads):
    cache_entry(cache, "org/tiny", WHOLE)
    here = cache.parent / "org" / "tiny"
    here.mkdir(parents=True)
    assert find_model("org/tiny", here) == local_model("org/tiny", here) == here
    assert downloads == []


def test_a_link_that_leads_nowhere_is_a_path_too(cache: Path, downloads: Downloads):
    (cache.parent / "org").mkdir()
    here = cache.parent / "org" / "tiny"
    here.symlink_to("absent")
    assert find_model("org/tiny", here) == here
    assert downloads == []


def test_the_folder_of_a_cache_entry_is_its_snapshot(cache: Path, downloads: Downloads):
    snapshot = cache_entry(cache, "org/tiny", WHOLE)
    entry = snapshot.parents[1]
    assert find_model(str(entry), entry) == local_model(str(entry), entry) == snapshot
    assert downloads == []


def test_a_whole_copy_in_the_cache_needs_no_hub(cache: Path, downloads: Downloads):
    snapshot = cache_entry(cache, "org/tiny", WHOLE)
    path = cache.parent / "org" / "tiny"
    for need in ("config", "tokenizer", "weights"):
        assert find_model("org/tiny", path, need) == snapshot  # type: ignore[arg-type]
    assert local_model("org/tiny", path) == snapshot
    assert downloads == []


def test_what_is_missing_is_downloaded(cache: Path, downloads: Downloads):
    path, said = cache.parent / "org" / "tiny", []
    assert local_model("org/tiny@v1", path) == path
    assert find_model("org/tiny@v1", path, "config", lambda *step: said.append(step)) == cache / "downloaded"
    snapshot = cache_entry(cache, "org/tiny", {"config.json": b"{}"})  # as `plan` leaves it
    assert find_model("org/tiny", path, "config") == local_model("org/tiny", path) == snapshot
    assert find_model("org/tiny", path) == cache / "downloaded"
    assert downloads == [("org/tiny@v1", "config"), ("org/tiny", "weights")]
    assert said == [("downloading", 1, 2)]


def test_no_name_of_a_hub_is_a_path(cache: Path, downloads: Downloads):
    assert find_model("tiny", Path("tiny")) == Path("tiny")
    assert find_model("a/b/c", Path("a/b/c")) == Path("a/b/c")
    assert downloads == []


def test_a_gguf_file_in_the_cache_is_whole(cache: Path, downloads: Downloads):
    snapshot = cache_entry(cache, "org/tiny", {"t-Q8_0.gguf": b"GGUF"})
    assert find_model("org/tiny:q8_0", Path("org/tiny:q8_0"), "config") == snapshot / "t-Q8_0.gguf"
    with pytest.raises(HubError, match=r"org/tiny:q4_0: is not on this machine, .*: run: hf download org/tiny q4_0"):
        find_model("org/tiny:q4_0", Path("org/tiny:q4_0"), "config")
    assert downloads == []
    assert find_model("org/tiny:q4_0", Path("org/tiny:q4_0")) == cache / "downloaded"


def test_offline_nothing_is_downloaded(cache: Path, downloads: Downloads, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = Path("org/tiny")
    with pytest.raises(HubError) as caught:
        find_model("org/tiny", path)
    assert str(caught.value) == (
        f"org/tiny: is not in the cache {cache}, and HF_HUB_OFFLINE forbids downloads: unset it, or copy the model "
        "into the cache"
    )
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    files = {"config.json": b"{}", "1.safetensors": b"", "model.safetensors.index.json": json.dumps(index).encode()}
    cache_entry(cache, "org/tiny", files)
    with pytest.raises(HubError, match=r"its copy in the cache .* lacks 2.safetensors, and HF_HUB_OFFLINE forbids"):
        find_model("org/tiny", path)
    assert downloads == []


def test_weights_without_a_tokenizer_do_where_there_is_no_hub(cache: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = cache_entry(cache, "org/tiny", {"config.json": b"{}", "model.safetensors": b"w"})
    refuse(monkeypatch, "cannot be downloaded")
    assert find_model("org/tiny", Path("org/tiny")) == snapshot
    with pytest.raises(HubError, match="cannot be downloaded"):
        find_model("org/tiny", Path("org/tiny"), "tokenizer")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model("org/tiny", Path("org/tiny")) == snapshot


def test_an_error_says_both_ways(cache: Path, monkeypatch: pytest.MonkeyPatch):
    refuse(monkeypatch, "there is no such model: check the name")
    with pytest.raises(UserError) as caught:
        model_argument("--model", Path("org/tiny"))
    assert str(caught.value) == (
        "--model: org/tiny: there is no such model: check the name (there is no folder org/tiny either)"
    )


def test_a_name_stays_as_it_was_written(cache: Path):
    assert as_named("org/tiny", cache.parent / "org" / "tiny") == Path("org/tiny")
    assert as_named("absent", cache.parent / "absent") == cache.parent / "absent"
    assert as_named("hf", cache) == cache
