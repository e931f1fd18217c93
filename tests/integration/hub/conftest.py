"""A hub of this machine, and the command line that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub.stand_in import Hub, running_hub
from tests.support.paths import NEEDLE

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "config_1m.json")


@pytest.fixture(scope="session")
def needle() -> dict[str, bytes]:
    """The files of a model of 16 MB, and two that no program needs."""
    files = {name: (NEEDLE / name).read_bytes() for name in FILES}
    return files | {"README.md": b"# A model", "onnx/model.onnx": b"no"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


@pytest.fixture
def hub(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that processes started from here find in place of the real ones."""
    for variable in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "scope"))
        yield hub
