"""The model that is trained: experts against their definition, logits against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support.data.training import first_digits, maker, tiny_model
from workers.training import needle
from workers.training.checkpoint import load_weights, write_directory
from workers.training.data import Corpus
from workers.training.model import Experts, shape_of

ASSETS = needle.ASSETS


@pytest.mark.parametrize("tokens", [1, 255, 256, 257, 401])
def test_padded_experts_equal_the_plain_sum(assets: Path, tokens: int) -> None:
    torch.manual_seed(0)
    experts = tiny_model(assets).layers[0].mlp
    assert isinstance(experts, Experts)
    x = torch.randn(tokens, 128)
    with torch.no_grad():
        experts.gate.weight[3] = 0.0  # an expert that is rarely chosen
        experts.gate.weight.mul_(20)
        experts.down_proj.mul_(50)
        weights, chosen = experts.gate(x).softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        expected = torch.zeros_like(x)
        for token in range(tokens):
            for weight, e in zip(weights[token], chosen[token], strict=True):
                inner = F.silu(experts.gate_proj[e] @ x[token]) * (experts.up_proj[e] @ x[token])
                expected[token] += weight * (experts.down_proj[e] @ inner)
        got, balance = experts(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert float(balance) > 0


def test_equal_shares_cost_one(assets: Path) -> None:
    experts = tiny_model(assets).layers[0].mlp
    assert isinstance(experts, Experts)
    with torch.no_grad():
        experts.gate.weight.zero_()
        _, balance = experts(torch.randn(8, 128))
    assert float(balance) == pytest.approx(1.0)


def test_logits_equal_transformers(assets: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_directory(tiny_model(assets), assets, tmp_path)
    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_weights(tmp_path)
    tokens = torch.randint(1, 4096, (2, 97), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        got = ours.logits(ours(tokens)[0].flatten(0, 1)).view_as(expected)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("key", "value"), [("model_type", "qwen3"), ("tie_word_embeddings", False), ("rope_scaling", {"type": "yarn"})]
)
def test_other_architectures_are_refused(assets: Path, key: str, value: object) -> None:
    config = {**json.loads((assets / "config.json").read_text()), key: value}
    with pytest.raises(ValueError, match=key):
        shape_of(config)


def test_the_shipped_checkpoint_answers(corpus: Corpus) -> None:
    documents = [maker(corpus, seed).haystack(512, 8, 6) for seed in range(2)]
    assert first_digits(load_weights(ASSETS), documents, tuple(range(corpus.vocab))) > 0.9
