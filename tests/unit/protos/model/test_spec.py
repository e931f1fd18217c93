"""Sizes of a model, and its way through JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from protos.model.spec import DualChunkSpec, HeadBudget, ModelSpec, RopeSpec, SparseSpec

SPEC = ModelSpec(
    model_type="qwen3_moe", vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, intermediate_size=512, rms_norm_eps=1e-6, tie_word_embeddings=True,
    qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=True, rope=RopeSpec(theta=1e6, mscale=0.5),
    max_position_embeddings=4096, dtype="bfloat16", eos_token_ids=(0, 7), mlp_only_layers=(1, 3),
)  # fmt: skip
PATTERNS = ((HeadBudget(1, 2), None), (None, HeadBudget(3, 4)))


@pytest.mark.parametrize("field", ["eos_token_ids", "rope", "rms_norm_eps", "mlp_only_layers"])
def test_json_keeps_types(field: str) -> None:
    got = ModelSpec.from_json(SPEC.to_json())
    assert got == SPEC
    assert type(getattr(got, field)) is type(getattr(SPEC, field))


@pytest.mark.parametrize(
    "changes",
    [
        {"dual_chunk": DualChunkSpec(4096, 512, 4096)},
        {"sparse": SparseSpec(patterns=PATTERNS)},
        {"sparse": SparseSpec(uniform=HeadBudget(5, 6)), "dual_chunk": DualChunkSpec(2, 1)},
        {"sparse": SparseSpec(target_recall=0.5, synthetic=True)},
    ],
)
def test_json_keeps_long_contexts(changes: dict[str, object]) -> None:
    spec = replace(SPEC, **changes)  # type: ignore[arg-type]
    assert ModelSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", "{}", '{"rope": 1}', '{"rope": {"theta": 1}}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        ModelSpec.from_json(text)


@pytest.mark.parametrize(
    "change", [{"rope": None}, {"rope": [1]}, {"more": 1}, {"sparse": {"cells": 1}}, {"eos_token_ids": 1}]
)
def test_json_of_another_build_is_refused(change: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        ModelSpec.from_json(json.dumps(json.loads(SPEC.to_json()) | change))


@pytest.mark.parametrize(("length", "scale"), [(1, 1.0), (4096, 1.0), (8192, 0.1 * math.log(2) + 1)])
def test_length_scale(length: int, scale: float) -> None:
    assert DualChunkSpec(4096, 512, 4096).length_scale(length) == pytest.approx(scale)
    assert DualChunkSpec(4096, 512).length_scale(length) == 1.0


def test_chunks_and_experts() -> None:
    assert SPEC.chunk_distance == 0
    assert replace(SPEC, dual_chunk=DualChunkSpec(4096, 512)).chunk_distance == 3584
    assert not any(SPEC.is_moe_layer(layer) for layer in range(4))
    sparse = replace(SPEC, num_experts=8, decoder_sparse_step=2, mlp_only_layers=(3,))
    assert [sparse.is_moe_layer(layer) for layer in range(4)] == [False, True, False, False]


def test_which_budgets_are_adaptive() -> None:
    assert SparseSpec().is_adaptive
    assert not SparseSpec(uniform=HeadBudget(1, 1)).is_adaptive
    assert not SparseSpec(patterns=PATTERNS).is_adaptive
