"""The model of the benchmark: its shape, its weights, and the bytes of a decode step."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from workers.bench.gpu.context import Context
from workers.bench.gpu.journal import Journal
from workers.bench.gpu.whole.model import attention_spec, decode_bytes, model_spec, num_weights, random_weights
from workers.model.weights import LayerWeights, dummy_shard, whole_model

CPU = torch.device("cpu")


def context_of(rehearsal: bool) -> Context:
    return Context(Journal(Path("unused"), "x", rehearsal), CPU, time.monotonic() + 60)


def test_the_shape_is_that_of_qwen3_30b_a3b() -> None:
    spec = model_spec(context_of(False))
    assert num_weights(spec) == 30_532_122_624  # as its checkpoint has
    recipe = attention_spec(context_of(False), sparse=True, chunks=True)
    assert recipe.chunk_distance == 253_952
    assert recipe.sparse is not None
    assert recipe.sparse.uniform is not None
    assert (recipe.sparse.uniform.n_vertical, recipe.sparse.uniform.n_slash) == (17_408, 23_552)
    assert recipe.sparse.recall_floor == 0
    assert not recipe.sparse.is_adaptive


def test_weights_have_the_shapes_of_a_loaded_shard() -> None:
    spec = model_spec(context_of(True))
    mine = random_weights(spec, torch.float32, CPU)
    other = dummy_shard(spec, whole_model(spec), torch.float32, CPU)
    assert mine.num_bytes == other.num_bytes
    for name in ("embed", "norm", "lm_head"):
        assert getattr(mine, name).shape == getattr(other, name).shape
    for first, second in zip(mine.layers, other.layers, strict=True):
        for field in fields(LayerWeights):
            one, two = getattr(first, field.name), getattr(second, field.name)
            assert (one is None) == (two is None), field.name
            assert one is None or one.shape == two.shape
    matrix = mine.layers[-1].experts_down
    assert isinstance(matrix, torch.Tensor)
    assert float(matrix.std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(matrix[0], matrix[1]), "experts differ"


def test_bytes_of_a_decode_step() -> None:
    spec = model_spec(context_of(False))
    weights = decode_bytes(spec, 0, torch.bfloat16)
    assert weights == pytest.approx(6.1e9, rel=0.02)
    assert decode_bytes(spec, 1 << 20, torch.bfloat16) - weights == 48 * 2 * 4 * 128 * 2 << 20
    assert decode_bytes(spec, 1 << 20, torch.int8) - weights == 48 * 2 * 4 * (128 + 4) << 20
    assert decode_bytes(replace(spec, num_experts_per_tok=0), 0, torch.bfloat16) < weights
