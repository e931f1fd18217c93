"""Layer balance, head and expert splits, and weight arithmetic, against brute force and the real checkpoint."""

import json
import time
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.common.text_format import show_value
from cluster.config.topology import (
    LayoutError,
    balance,
    kv_bytes_per_token,
    layer_cost,
    plan_shards,
    shard_weight_bytes,
)
from protos.model.spec import ModelSpec, RopeSpec
from protos.stage.messages import Span
from tests.support.paths import NEEDLE as NEEDLE_DIR

NEEDLE = ModelSpec(
    model_type="qwen3_moe",
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=512,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    rope=RopeSpec(theta=200000.0),
    max_position_embeddings=4096,
    dtype="bfloat16",
    eos_token_ids=(0,),
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
)
DENSE = replace(NEEDLE, model_type="qwen3", num_experts=0, num_experts_per_tok=0, moe_intermediate_size=0)
QWEN3_30B = replace(
    NEEDLE,
    vocab_size=151_936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    intermediate_size=6144,
    tie_word_embeddings=False,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)


def brute_force(costs: list[int], parts: int) -> int:
    """The least possible largest sum over all contiguous cuts."""
    return min(
        max(sum(costs[a:b]) for a, b in pairwise((0, *cuts, len(costs))))
        for cuts in combinations(range(1, len(costs)), parts - 1)
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_balance_is_optimal_and_covers(costs: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(costs)))
    spans = balance(costs, parts)
    assert len(spans) == parts
    assert spans[0].start == 0
    assert spans[-1].stop == len(costs)
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert all(span.size >= 1 for span in spans)
    assert max(sum(costs[slice(*span)]) for span in spans) == brute_force(costs, parts)


@pytest.mark.parametrize(
    ("layers", "parts", "sizes"),
    [
        (1, 1, [1]),
        (4, 1, [4]),
        (4, 2, [2, 2]),
        (4, 3, [2, 1, 1]),
        (4, 4, [1, 1, 1, 1]),
        (5, 2, [3, 2]),
        (7, 3, [3, 2, 2]),
        (9, 4, [3, 2, 2, 2]),
        (48, 5, [10, 10, 10, 9, 9]),
        (94, 8, [12] * 6 + [11] * 2),
    ],
)
def test_equal_layers_are_spread_evenly_and_the_last_stage_is_never_larger(
    layers: int, parts: int, sizes: list[int]
) -> None:
    assert [span.size for span in balance([3] * layers, parts)] == sizes


def test_dense_layers_weigh_what_they_compute() -> None:
    mixed = replace(NEEDLE, num_hidden_layers=5, mlp_only_layers=(0, 1), intermediate_size=16_384)
    attention, router = 256 * 64 * 2 * (4 + 2), 256 * 16
    assert layer_cost(mixed, 0) == attention + 3 * 256 * 16_384
    assert layer_cost(mixed, 4) == attention + router + 3 * 256 * 2 * 128
    assert [shard.layers for shard in plan_shards(mixed, 2, 1)] == [Span(0, 1), Span(1, 5)]


def test_the_layers_of_stages_may_be_given() -> None:
    shards = plan_shards(NEEDLE, 2, 2, [3, 1])
    assert [shard.layers for shard in shards] == [Span(0, 3)] * 2 + [Span(3, 4)] * 2


@pytest.mark.parametrize("layers", [(), (4,), (2, 1), (4, 0), (5, -1), (1, 1, 2)])
def test_layers_of_stages_that_are_not_all_layers_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(
        LayoutError, match=r"^stage_layers: .*: must be 2 numbers from 1 on .* that make 4, the model's"
    ):
        plan_shards(NEEDLE, 2, 1, layers)


def test_needle_on_two_by_two() -> None:
    shards = plan_shards(NEEDLE, 2, 2)
    assert [(s.stage, s.rank, s.num_stages, s.num_ranks) for s in shards] == [
        (0, 0, 2, 2), (0, 1, 2, 2), (1, 0, 2, 2), (1, 1, 2, 2)
    ]  # fmt: skip
    last = shards[-1]
    assert last.layers == Span(2, 4)
    assert last.heads == Span(2, 4)
    assert last.kv_heads == Span(1, 2)
    assert last.experts == Span(8, 16)
    assert last.intermediate == Span(0, 0)
    assert last.vocab == Span(2048, 4096)
    assert last.is_last
    assert not last.is_first


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "expected"),
    [
        (4, 2, 1, [(0, 2)]),
        (4, 2, 2, [(0, 1), (1, 2)]),
        (4, 2, 4, [(0, 1), (0, 1), (1, 2), (1, 2)]),
        (32, 4, 8, [(0, 1), (0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (3, 4), (3, 4)]),
        (7, 7, 7, [(r, r + 1) for r in range(7)]),
        (12, 6, 3, [(0, 2), (2, 4), (4, 6)]),
        (8, 1, 4, [(0, 1)] * 4),
    ],
)
def test_kv_heads_follow_query_heads(heads: int, kv_heads: int, ranks: int, expected: list[tuple[int, int]]) -> None:
    spec = replace(NEEDLE, num_attention_heads=heads, num_key_value_heads=kv_heads, num_experts=16 * ranks)
    shards = plan_shards(spec, 1, ranks)
    assert [tuple(shard.kv_heads) for shard in shards] == expected
    for shard in shards:
        read = {head // (heads // kv_heads) for head in range(*shard.heads)}
        assert read == set(range(*shard.kv_heads))


@pytest.mark.parametrize(
    ("spec", "key", "stages", "ranks", "allowed"),
    [
        (NEEDLE, "pipeline_parallel_size", 0, 1, (1, 2, 3, 4)),
        (NEEDLE, "pipeline_parallel_size", -1, 1, (1, 2, 3, 4)),
        (NEEDLE, "pipeline_parallel_size", 5, 1, (1, 2, 3, 4)),
        (NEEDLE, "pipeline_parallel_size", 10**100, 1, (1, 2, 3, 4)),
        (NEEDLE, "expert_parallel_size", 2, 3, (1, 2, 4)),
        (NEEDLE, "expert_parallel_size", 2, 0, (1, 2, 4)),
        (NEEDLE, "expert_parallel_size", 2, 8, (1, 2, 4)),
        (replace(NEEDLE, num_experts=6), "expert_parallel_size", 1, 4, (1, 2)),
        (replace(NEEDLE, num_attention_heads=24, num_key_value_heads=6), "expert_parallel_size", 1, 4, (1, 2)),
        (replace(DENSE, intermediate_size=514), "expert_parallel_size", 1, 4, (1, 2)),
        (QWEN3_30B, "expert_parallel_size", 1, 3, (1, 2, 4, 8, 16, 32)),
    ],
)
def test_refused_layouts_list_what_would_do(
    spec: ModelSpec, key: str, stages: int, ranks: int, allowed: tuple[int, ...]
) -> None:
    with pytest.raises(LayoutError) as caught:
        plan_shards(spec, stages, ranks)
    error = caught.value
    assert error.key == key
    value = stages if key.startswith("pipeline") else ranks
    assert str(error).startswith(f"{key}: {show_value(value)}: must be ")
    listed = f"between 1 and {len(allowed)}" if key.startswith("pipeline") else f"one of {', '.join(map(str, allowed))}"
    assert f"must be {listed} (the model has " in str(error)
    assert len(str(error).splitlines()) == 1
    for size in allowed:  # what it lists is true
        assert plan_shards(spec, *((size, 1) if key.startswith("pipeline") else (1, size)))


def test_three_shards_for_sixteen_experts_says_what_is_allowed() -> None:
    with pytest.raises(LayoutError, match=r"expert_parallel_size: 3: must be one of 1, 2, 4 \(.*16 experts\)$"):
        plan_shards(NEEDLE, 2, 3)


def test_dense_models_split_columns_and_have_no_experts() -> None:
    shards = plan_shards(DENSE, 1, 4)
    assert [shard.experts for shard in shards] == [Span(0, 0)] * 4
    assert [shard.intermediate for shard in shards] == [Span(r * 128, (r + 1) * 128) for r in range(4)]


@pytest.mark.parametrize("vocab", [1, 3, 4, 5, 4093, 4096])
def test_vocabulary_rows_are_spread_with_remainder(vocab: int) -> None:
    spans = [shard.vocab for shard in plan_shards(replace(NEEDLE, vocab_size=vocab), 1, 4)]
    assert spans[0].start == 0
    assert spans[-1].stop == vocab
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert max(span.size for span in spans) - min(span.size for span in spans) <= 1


def test_weights_of_one_shard_are_the_checkpoint() -> None:
    with (NEEDLE_DIR / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    stored = sum(
        end - start
        for name, tensor in header.items()
        if name != "__metadata__"
        for start, end in [tensor["data_offsets"]]
    )
    (whole,) = plan_shards(NEEDLE, 1, 1)
    assert shard_weight_bytes(NEEDLE, whole, 2) == stored


def test_weights_of_shards_add_up_except_for_what_is_replicated() -> None:
    whole = shard_weight_bytes(QWEN3_30B, plan_shards(QWEN3_30B, 1, 1)[0], 1)
    assert whole == 30_532_122_624  # the published parameter count
    stages = plan_shards(QWEN3_30B, 3, 1)
    assert sum(shard_weight_bytes(QWEN3_30B, shard, 1) for shard in stages) == whole
    ranks = plan_shards(QWEN3_30B, 1, 2)
    replicated = 48 * (2 * 2048 + 2 * 128 + 2048 * 128) + 2048  # norms and routers
    assert sum(shard_weight_bytes(QWEN3_30B, shard, 1) for shard in ranks) == whole + replicated


def test_tied_embeddings_are_held_by_both_ends() -> None:
    one = shard_weight_bytes(NEEDLE, plan_shards(NEEDLE, 1, 1)[0], 1)
    two = sum(shard_weight_bytes(NEEDLE, shard, 1) for shard in plan_shards(NEEDLE, 2, 1))
    assert two - one == 4096 * 256


def test_biases_are_counted() -> None:
    spec = replace(DENSE, qkv_bias=True, o_bias=True, mlp_bias=True)
    plain, biased = (shard_weight_bytes(s, plan_shards(s, 1, 1)[0], 1) for s in (DENSE, spec))
    assert biased - plain == 4 * ((4 + 2 * 2) * 64 + 256 + 2 * 512 + 256)


@pytest.mark.parametrize(
    ("spec", "stages", "ranks", "expected"),
    [(NEEDLE, 1, 1, 2 * 4 * 2 * 64 * 2), (NEEDLE, 2, 2, 2 * 2 * 1 * 64 * 2), (QWEN3_30B, 2, 1, 48 << 10)],
)
def test_kv_bytes_per_token(spec: ModelSpec, stages: int, ranks: int, expected: int) -> None:
    assert {kv_bytes_per_token(spec, shard, 2) for shard in plan_shards(spec, stages, ranks)} == {expected}


@pytest.mark.parametrize("stages", [8, 500])
def test_many_layers_are_cut_in_seconds(stages: int) -> None:
    """Far more layers than any model has, and costs beyond 64 bits."""
    started = time.perf_counter()
    spans = balance([7 << 64, 11 << 64] * 500, stages)
    assert time.perf_counter() - started < 10.0
    assert [span.start for span in spans[1:]] == [span.stop for span in spans[:-1]]
    assert (spans[0].start, spans[-1].stop, len(spans)) == (0, 1000, stages)
