"""The units of a step, by hand for a small shape."""

from __future__ import annotations

import pytest

from cluster.config.topology import plan_shards, shard_weight_bytes
from cluster.latency.step_work import UNITS, ShardWork, StepCounts, causal_pairs
from protos.model.spec import ModelSpec, RopeSpec, SparseSpec

SPEC = ModelSpec(
    model_type="qwen3_moe", vocab_size=100, hidden_size=8, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, intermediate_size=32, rms_norm_eps=1e-6, tie_word_embeddings=False,
    qkv_bias=False, o_bias=False, mlp_bias=False, qk_norm=False, rope=RopeSpec(1e4), max_position_embeddings=4096,
    dtype="bfloat16", eos_token_ids=(2,), num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16,
    sparse=SparseSpec(),
)  # fmt: skip
ATTENTION = 8 * 4 * 2 * (4 + 2)
EXPERT = 3 * 8 * 16
ALWAYS = 2 * (ATTENTION + 2 * 8 + 8 * 4)


def units(counts: StepCounts, layout: tuple[int, int] = (1, 1), shard: int = 0) -> dict[str, float]:
    work = ShardWork(SPEC, plan_shards(SPEC, *layout)[shard], 2, 2.0)
    return dict(zip(UNITS, map(float, work.units(counts)), strict=True))


def test_a_decode_step():
    found = units(StepCounts(1, 1, 100, 100, 0))
    assert found["layers"] == 2
    assert found["weight_bytes"] == pytest.approx(2 * (ALWAYS + 2 * EXPERT + 800))
    assert found["flops"] == pytest.approx(2 * (ALWAYS + 2 * EXPERT + 800))
    assert found["kv_bytes"] == 100 * 2 * 2 * 2 * 4 * 2
    assert found["attention_flops"] == 4 * 2 * 4 * 4 * 100
    assert found["estimate_flops"] == found["reduced_bytes"] == 0


def test_many_rows_touch_every_expert_once():
    two, many = (units(StepCounts(rows, 0, 0, 0, 0))["weight_bytes"] for rows in (2, 1000))
    assert two == pytest.approx(2 * (ALWAYS + 2 * EXPERT * 4 * (1 - 0.75**2)))
    assert many == pytest.approx(2 * (ALWAYS + 2 * 4 * EXPERT))
    tables = 2 * 100 * 8 + 8
    whole = shard_weight_bytes(SPEC, plan_shards(SPEC, 1, 1)[0], 2)
    assert many == pytest.approx(whole - 2 * tables), "embedding and head are not read"


def test_sparse_cells_are_estimated():
    cells = units(StepCounts(8192, 0, 20_000, 1e6, 20_000))
    assert cells["estimate_flops"] == 2 * 4 * 4 * 4 * 2 * 64 * 20_000


@pytest.mark.parametrize("layout", [(2, 1), (1, 2), (2, 2)])
def test_shards_share_the_work(layout: tuple[int, int]):
    counts = StepCounts(512, 1, 600, 9999, 0)
    whole = units(counts)
    parts = [units(counts, layout, shard) for shard in range(layout[0] * layout[1])]
    for unit in ("kv_bytes", "attention_flops"):
        assert sum(part[unit] for part in parts) == pytest.approx(whole[unit])
    assert sum(part["layers"] for part in parts) == 2 * layout[1]
    assert sum(part["flops"] for part in parts) >= whole["flops"], "norms and routers are computed by every rank"
    moved = 2 * 512 * 8 * 2 * (2 * (layout[1] - 1) / layout[1])
    assert sum(part["reduced_bytes"] for part in parts) == pytest.approx(2 * layout[1] * moved)


def test_pairs():
    assert causal_pairs(0, 67) == 67 * 68 / 2
    assert causal_pairs(100, 1) == 101
