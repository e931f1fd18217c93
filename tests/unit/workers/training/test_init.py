"""The starting circuit finds needles before any training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.data.training import first_digits, maker, tiny_model
from workers.training import needle
from workers.training.data import Corpus
from workers.training.init import initialise
from workers.training.model import Layer, NeedleModel, rope_frequencies, shape_of

ASSETS = needle.ASSETS


def test_the_circuit_finds_needles_before_any_training(corpus: Corpus) -> None:
    model = NeedleModel(shape_of(json.loads((ASSETS / "config.json").read_text())))
    initialise(model, 0)
    documents = [maker(corpus, seed).haystack(256, 4, 2) for seed in range(8)]
    # Among digits only: at first the question's own "Answer" also stands 3 behind the noun and competes.
    assert first_digits(model, documents, corpus.digits) > 0.7  # chance is 0.1


def test_same_seed_same_weights(assets: Path) -> None:
    one, same, other = (tiny_model(assets, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["embed_tokens.weight"], other["embed_tokens.weight"])


def test_layer_0_looks_back(assets: Path) -> None:
    model = tiny_model(assets)
    layer = model.layers[0]
    assert isinstance(layer, Layer)
    tokens = torch.randint(1, 4096, (1, 40), generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    tokens[1, 20] += 1
    angles = torch.arange(40.0)[:, None, None] * rope_frequencies(model.shape)
    with torch.no_grad():
        written = layer.self_attn(layer.input_layernorm(model.embed_tokens(tokens)), angles.cos(), angles.sin())
    for head in range(4):
        moved = (written[0] - written[1])[:, 64 + 16 * head : 80 + 16 * head].norm(dim=-1)
        assert int(moved.argmax()) == 21 + head


@pytest.mark.parametrize("change", [{"num_key_value_heads": 4}, {"rope_theta": 100.0}, {"head_dim": 128}])
def test_sizes_that_cannot_hold_it_are_refused(assets: Path, change: dict[str, object]) -> None:
    config = {**json.loads((assets / "config.json").read_text()), **change}
    with pytest.raises(ValueError, match="starting circuit needs"):
        initialise(NeedleModel(shape_of(config)), 0)
