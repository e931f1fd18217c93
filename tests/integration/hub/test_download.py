"""Downloads from a hub of this machine: what is fetched, what is said when it cannot be, what an interrupt leaves."""

from __future__ import annotations

import os
import re
from pathlib import Path

import psutil
import pytest

from cluster.hub.download import download
from cluster.hub.names import HubError, HubName, Need, OnProgress
from tests.support.hub.stand_in import COMMIT, OTHER_COMMIT, TOKEN, Hub

NAME = "org/needle"
WEIGHTS = "model.safetensors"
MIB = 1 << 20
Files = dict[str, bytes]


def fetch(text: str, need: Need = "weights", on_progress: OnProgress = lambda phase, done, total: None) -> Path:
    name = HubName.parse(text)
    assert name is not None
    return download(name, need, on_progress)


def refusal(text: str, need: Need = "weights") -> str:
    with pytest.raises(HubError) as caught:
        fetch(text, need)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_whole_model(hub: Hub, cache: Path, needle: Files):
    hub.add(NAME, needle)
    steps: list[tuple[str, int, int]] = []
    folder = fetch(NAME, on_progress=lambda *step: steps.append(step))
    assert folder == cache / "models--org--needle" / "snapshots" / COMMIT
    got = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert got == {name: needle[name] for name in needle if name not in ("README.md", "onnx/model.onnx")}
    assert steps[0] == ("looking up org/needle", 0, 0)
    assert {total for _, _, total in steps[1:]} <= {sum(map(len, got.values()))}
    assert all(0 <= done <= total for _, done, total in steps)
    hub.asked.clear()
    assert fetch(NAME) == folder
    assert hub.downloads() == []


def test_settings_alone(hub: Hub, needle: Files):
    hub.add(NAME, needle)
    assert {path.name for path in fetch(NAME, "config").iterdir()} == {"config.json", "config_1m.json"}
    assert sorted(hub.downloads()) == ["config.json", "config_1m.json"]
    hub.asked.clear()
    fetch(NAME, "tokenizer")
    assert sorted(hub.downloads()) == ["tokenizer.json", "tokenizer_config.json"]


def test_one_gguf_file(hub: Hub, needle: Files):
    hub.add("org/gguf", {"t-Q4_K_M.gguf": b"GGUF4", "t-Q8_0.gguf": b"GGUF8", "README.md": b""})
    assert fetch("org/gguf:t-Q8_0.gguf").read_bytes() == b"GGUF8"
    assert fetch("org/gguf:q4_k_m").read_bytes() == b"GGUF4"
    assert hub.downloads() == ["t-Q8_0.gguf", "t-Q4_K_M.gguf"]
    assert "holds GGUF files: name one, such as org/gguf:t-Q4_K_M.gguf" in refusal("org/gguf")


def test_a_revision(hub: Hub, needle: Files):
    repo = hub.add(NAME, needle)
    repo.commits[OTHER_COMMIT] = needle | {"config.json": b"{}"}
    repo.branches["v2"] = OTHER_COMMIT
    for revision in ("v2", OTHER_COMMIT):
        assert (fetch(f"{NAME}@{revision}", "config") / "config.json").read_bytes() == b"{}"
    assert (fetch(NAME, "config") / "config.json").read_bytes() == needle["config.json"]
    assert refusal(f"{NAME}@v3") == "org/needle@v3: has no revision v3: name a branch, tag or commit of it"


def test_a_lost_connection_goes_on_where_it_broke_off(hub: Hub, needle: Files):
    hub.add(NAME, needle)
    hub.cut_once[WEIGHTS] = 12 * MIB
    try:
        folder = fetch(NAME)
    except HubError:  # versions of the library before 1.20 leave it to the next start
        folder = fetch(NAME)
    assert (folder / WEIGHTS).read_bytes() == needle[WEIGHTS]
    assert any(re.search(rf"{WEIGHTS} bytes=\d+-$", each) for each in hub.asked)


def test_an_interrupt_ends_at_once_and_keeps_what_is_finished(hub: Hub, cache: Path, needle: Files):
    hub.add(NAME, needle)
    hub.stalled[WEIGHTS] = 11 * MIB
    small = {name for name in needle if name.endswith(".json")}

    def interrupt(phase: str, done: int, total: int) -> None:
        if done >= 10 * MIB + sum(len(needle[name]) for name in small):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(NAME, on_progress=interrupt)
    assert not any("cluster.hub" in " ".join(child.cmdline()) for child in psutil.Process().children())
    blobs = list((cache / "models--org--needle" / "blobs").iterdir())
    left = [blob for blob in blobs if blob.name.endswith(".incomplete")]
    assert not any(re.search(r"\.[0-9a-f]{8}\.incomplete$", blob.name) for blob in left)  # nobody goes on with these
    finished = [blob.read_bytes() for blob in blobs if blob not in left]
    assert sorted(finished) == sorted(needle[name] for name in small)
    hub.stalled.clear()
    hub.asked.clear()
    assert (fetch(NAME) / WEIGHTS).read_bytes() == needle[WEIGHTS]
    assert hub.downloads() == [WEIGHTS]


def test_a_model_that_is_not_there_or_private(hub: Hub, needle: Files, monkeypatch: pytest.MonkeyPatch):
    hub.add("org/private", needle, gate="private")
    for name in ("org/absent", "org/private"):
        assert refusal(name) == (
            f"{name}: there is no such model on {hub.url}, or it is private: check the name, or sign in (hf auth "
            "login, or HF_TOKEN)"
        )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (fetch("org/private", "config") / "config.json").is_file()


def test_terms_without_consent(hub: Hub, needle: Files, monkeypatch: pytest.MonkeyPatch):
    hub.add(NAME, needle, gate="terms")
    assert refusal(NAME) == (
        f"org/needle: asks for consent to its terms: give it at {hub.url}/org/needle, then sign in (hf auth login, or "
        "HF_TOKEN)"
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (fetch(NAME, "config") / "config.json").is_file()


def test_a_disk_without_room(hub: Hub, cache: Path, needle: Files):
    hub.add(NAME, needle, claimed={WEIGHTS: 1 << 60})
    said = refusal(NAME)
    assert f"are to be downloaded into {cache / 'models--org--needle'}, whose disk has" in said
    assert said.endswith("free: make room, or let HF_HUB_CACHE name a folder on another disk")
    assert hub.downloads() == []


def test_a_hub_that_cannot_be_asked(hub: Hub, needle: Files, monkeypatch: pytest.MonkeyPatch):
    hub.add(NAME, needle)
    hub.status = 403
    assert "answers with HTTP status 403: sign in" in refusal(NAME)
    hub.status = 418
    assert "answers with HTTP status 418: try again later" in refusal(NAME)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said = refusal(NAME)
    assert "cannot be downloaded from http://127.0.0.1:9 (" in said
    assert said.endswith("check the connection and HF_ENDPOINT, then start it again")


def test_modelscope(hub: Hub, tmp_path: Path, needle: Files):
    pytest.importorskip("modelscope_hub")
    hub.add(NAME, needle)
    folder = fetch(f"modelscope:{NAME}")
    assert folder == tmp_path / "scope" / "models" / "org--needle" / "snapshots" / "master"
    got = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert got == {name: needle[name] for name in needle if name not in ("README.md", "onnx/model.onnx")}
    assert "modelscope:org/absent: there is no such model on ModelScope, or no such" in refusal("modelscope:org/absent")
    assert "no such revision" in refusal(f"modelscope:{NAME}@v9")


def test_modelscope_without_its_library(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "modelscope_hub.py").write_text("raise ImportError('hidden')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hidden'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    assert refusal("modelscope:org/needle") == (
        "modelscope:org/needle: needs a package that is not installed: pip install 'longreach[modelscope]'"
    )
