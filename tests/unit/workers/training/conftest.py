"""One thread, the shipped assets cut short, and their corpus."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.data.training import TINY
from workers.training import needle
from workers.training.checkpoint import COPIED
from workers.training.data import Corpus, load_corpus

ASSETS = needle.ASSETS


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped assets with a twentieth of the book and a config of 1 M parameters."""
    directory = tmp_path_factory.mktemp("assets")
    for name in COPIED:
        shutil.copyfile(ASSETS / name, directory / name)
    config = json.loads((ASSETS / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **TINY}))
    with gzip.open(ASSETS / "book.txt.gz", "rt") as book, gzip.open(directory / "book.txt.gz", "wt") as short:
        short.write(book.read(200_000))
    return directory


@pytest.fixture(scope="session")
def corpus(assets: Path) -> Corpus:
    return load_corpus(assets)


@pytest.fixture(autouse=True)
def keep_denormals() -> Iterator[None]:
    """Undo what training sets for its whole process: other tests compare denormal numbers."""
    yield
    torch.set_flush_denormal(False)
