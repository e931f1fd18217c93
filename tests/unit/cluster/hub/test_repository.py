"""What the hubs' libraries raise, as one line; downloads themselves are in tests/integration/hub."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from cluster.hub.names import HubError, HubName
from cluster.hub.repository import HuggingFaceRepository, _literal, open_repository

NAME = HubName("huggingface", "org/tiny", "v1")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HuggingFaceRepository:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub")
    repository = open_repository(NAME)
    assert isinstance(repository, HuggingFaceRepository)
    return repository


def test_files_are_looked_for_in_the_cache(repository: HuggingFaceRepository, tmp_path: Path):
    assert repository.root == tmp_path / "models--org--tiny"
    assert not repository.has("config.json")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            errors.LocalEntryNotFoundError("no network"),
            "org/tiny@v1: cannot be downloaded from https://hub (LocalEntryNotFoundError: no network): check the "
            "connection and HF_ENDPOINT, then start it again",
        ),
        (OSError(28, "No space left on device"), "(OSError: [Errno 28] No space left on device): check"),
        (HubError("org/tiny", "holds nothing"), "org/tiny: holds nothing"),
    ],
)
def test_errors_are_one_line(
    repository: HuggingFaceRepository, monkeypatch: pytest.MonkeyPatch, raised: Exception, said: str
):
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for call in (repository.sizes, lambda: repository.fetch(["config.json"])):
        with pytest.raises(HubError) as caught:
            call()
        assert said in str(caught.value)


def test_a_pattern_for_one_file():
    assert fnmatchcase("a[1]*?.json", _literal("a[1]*?.json"))
    assert not fnmatchcase("a1xx.json", _literal("a[1]*?.json"))
