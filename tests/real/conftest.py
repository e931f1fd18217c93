"""A real model and what it is compared with; skipped where its package, or llama.cpp, is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cluster.text.tokenizer import TextTokenizer
from tests.support.real.llama_cpp import VARIABLE, LlamaServer, installed, llama_server
from tests.support.real.models import MODELS, NotInstalled, gguf_file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker("real")


@pytest.fixture(scope="session", params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    """Return the name of a model."""
    return str(request.param)


@pytest.fixture(scope="session")
def gguf(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return gguf_file(name, tmp_path_factory.mktemp("real"))
    except NotInstalled as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def ours(gguf: Path) -> TextTokenizer:
    return TextTokenizer.open(gguf)


@pytest.fixture(scope="session")
def theirs(gguf: Path) -> PreTrainedTokenizerBase:
    """Return transformers' tokenizer, made out of the same file by its own converter."""
    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.fixture(scope="session")
def llama(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    if (program := installed()) is None:
        pytest.skip(f"llama-server is not installed: put llama.cpp's into PATH, or name it by {VARIABLE}")
    with llama_server(program, gguf, tmp_path_factory.mktemp("llama")) as server:
        yield server
