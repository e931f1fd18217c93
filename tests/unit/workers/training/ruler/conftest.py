"""Small samples of tasks, their tokenizer, and assets of a tiny model."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.support.data.training import TINY
from workers.training.needle import ASSETS
from workers.training.ruler.__main__ import NEEDED
from workers.training.ruler.vocabulary import extend


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The shipped tokenizer with a few words."""
    definition = json.loads((ASSETS / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps(extend(definition, ["apple", "river", " mentioned", " provided"])))


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped assets with few nouns and configs of 1 M parameters."""
    folder = tmp_path_factory.mktemp("assets")
    for name in NEEDED:
        shutil.copyfile(ASSETS / name, folder / name)
    for name in ("config.json", "config_1m.json"):
        config = json.loads((folder / name).read_text()) | TINY | {"num_hidden_layers": 3}
        (folder / name).write_text(json.dumps(config))
    words = {"adjectives": ["brave", "calm"], "nouns": ["apple", "river", "tower"]}
    (folder / "words.json").write_text(json.dumps(words))
    return folder


def needles(number: int, rng: random.Random) -> dict[str, object]:
    """A sample of `number` sentences, one of them asked for."""
    keys = [f"{first}-{second}" for first in ("brave", "calm") for second in ("apple", "river", "tower")]
    values = {key: str(rng.randint(1_000_000, 9_999_999)) for key in rng.sample(keys, number)}
    lines = [f"One of the special magic numbers for {key} is: {value}." for key, value in values.items()]
    key = rng.choice(list(values))
    text = "\n".join(lines)
    return {
        "input": f"{text}\nWhat is the special magic number for {key} mentioned in the provided text?",
        "answer_prefix": f" The special magic number for {key} mentioned in the provided text is",
        "outputs": [values[key]],
    }


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of samples of two lengths."""
    folder = tmp_path_factory.mktemp("samples")
    for length, number in ((192, 2), (320, 4)):
        path = folder / str(length) / "niah_multikey_2" / "validation.jsonl"
        path.parent.mkdir(parents=True)
        rng = random.Random(length)
        path.write_text("".join(json.dumps(needles(number, rng)) + "\n" for _ in range(40)))
    return folder
