"""One compute thread per test, and checkpoints and oracles made once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.support.data.checkpoints import make_checkpoint
from tests.support.oracles.transformers import Oracle

Checkpoints = Callable[[str], Path]
Oracles = Callable[[Path], Oracle]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shards of a pipeline are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Family -> folder of its checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        folder = root / family
        return folder if folder.exists() else make_checkpoint(folder, family)

    return get


@pytest.fixture(scope="session")
def oracle() -> Oracles:
    """Folder of a checkpoint -> transformers with that checkpoint in float32; remembers what it was asked."""
    known: dict[Path, Oracle] = {}

    def get(model_dir: Path) -> Oracle:
        if model_dir not in known:
            known[model_dir] = Oracle(model_dir)
        return known[model_dir]

    return get
