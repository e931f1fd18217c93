"""The starting circuit: it follows keys before any training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from tests.unit.workers.training.ruler.conftest import needles
from workers.training.data import collate
from workers.training.model import NeedleModel, shape_of
from workers.training.needle import ASSETS
from workers.training.ruler.data import FIRST_WEIGHT, DocumentMaker, Sample, token_id
from workers.training.ruler.start import initialise
from workers.training.ruler.vocabulary import extend, vocabulary_rows


def test_values_are_found_before_any_training() -> None:
    """Among the digits, the right first one scores highest far more often than by chance."""
    words = ["apple", "river", "tower", " special", " magic", " mentioned", " provided", " text"]
    definition = extend(json.loads((ASSETS / "tokenizer.json").read_text()), words)
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    config = json.loads((ASSETS / "config.json").read_text()) | {"vocab_size": vocabulary_rows(definition)}
    model = NeedleModel(shape_of(config))
    initialise(model, 0, token_id(tokenizer, "-"))
    maker = DocumentMaker(tokenizer, np.random.default_rng(0))
    documents = []
    for seed in range(12):
        entry = needles(6, random.Random(seed))
        sample = Sample("niah_multikey_2", entry["input"], entry["answer_prefix"], tuple(entry["outputs"]))  # type: ignore[arg-type]
        document = maker.make(sample, 384)
        assert document is not None
        documents.append(document)
    batch = collate(documents)
    digits = torch.tensor([token_id(tokenizer, str(digit)) for digit in range(10)])
    with torch.no_grad():
        hidden, _ = model(batch.tokens)
        rows = batch.rows[batch.weights == FIRST_WEIGHT]
        guesses = digits[model.logits(hidden.flatten(0, 1)[rows])[:, digits].argmax(-1)]
    targets = batch.targets[batch.weights == FIRST_WEIGHT]
    assert len(targets) > 40
    assert float((guesses == targets).float().mean()) > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_hidden_layers": 2}, "at least 3 layers"), ({"head_dim": 32}, "slow pairs; the starting circuit needs")],
)
def test_sizes_that_do_not_fit(change: dict[str, int], message: str, assets: Path) -> None:
    config = json.loads((ASSETS / "config.json").read_text()) | change
    with pytest.raises(ValueError, match=message):
        initialise(NeedleModel(shape_of(config)), 0, 5)


def test_weights_depend_on_the_seed_alone(assets: Path) -> None:
    config = json.loads((assets / "config.json").read_text())
    first, again, other = (NeedleModel(shape_of(config)) for _ in range(3))
    for model, seed in ((first, 0), (again, 0), (other, 1)):
        initialise(model, seed, 5)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
