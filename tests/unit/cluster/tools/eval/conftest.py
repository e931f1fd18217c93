"""Material, and counting with the shipped tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.eval.ruler.sample import Material, Sample, read_material


@pytest.fixture(scope="session")
def material() -> Material:
    return read_material()


@pytest.fixture(scope="session")
def count() -> Callable[[Sample], int]:
    tokenizer = TextTokenizer.open(needle_dir())
    return lambda sample: len(tokenizer.encode(sample.input + sample.answer_prefix))
