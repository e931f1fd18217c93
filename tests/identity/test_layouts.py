"""The layout and the chunk size change nothing: stages, shards, chunks, and requests that run side by side."""

from __future__ import annotations

import pytest

from tests.identity.conftest import Checkpoints, Oracles
from tests.support.fakes.pipeline import Pipeline
from tests.support.oracles.checks import LENGTHS, check_against, mixes_prefill_and_decode, three_prompts

WHOLE = sum(LENGTHS)


@pytest.mark.parametrize("chunk", [1, 17, 64, 256, WHOLE])
@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_every_layout_with_every_chunk_size(
    stages: int, ranks: int, chunk: int, checkpoint: Checkpoints, oracle: Oracles
) -> None:
    folder = checkpoint("qwen3_moe")
    with Pipeline(folder, stages, ranks, chunk=chunk).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size))
        assert max(plan.num_tokens for plan in pipeline.plans) == chunk
        if chunk in (17, 64):  # larger ones are through with all prompts before the first token comes back
            assert any(mixes_prefill_and_decode(plan) for plan in pipeline.plans)


COVERING = [
    ("qwen3_moe_raw", 2, 1, 1), ("qwen3_moe_raw", 1, 2, 256), ("qwen3_moe_raw", 2, 2, WHOLE),
    ("qwen3_moe_step2", 3, 1, 17), ("qwen3_moe_dense_layer", 3, 2, 64), ("qwen3_moe_dense_layer", 4, 1, 256),
    ("qwen3_moe_yarn", 2, 1, 1), ("qwen3_moe_yarn", 1, 2, 17),
    ("qwen3", 4, 2, 64), ("qwen2_tied", 2, 2, 256), ("llama_bias_llama3", 2, 2, WHOLE),
]  # fmt: skip


@pytest.mark.parametrize(("family", "stages", "ranks", "chunk"), COVERING)
def test_other_families_in_other_layouts(
    family: str, stages: int, ranks: int, chunk: int, checkpoint: Checkpoints, oracle: Oracles
) -> None:
    folder = checkpoint(family)
    with Pipeline(folder, stages, ranks, chunk=chunk).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size))


@pytest.mark.parametrize(
    ("family", "stages", "chunk", "count"),
    [
        ("qwen3_moe", 1, 64, 16),
        ("qwen3_moe", 2, 17, 64),
        ("qwen3_moe_raw", 2, 256, 16),
        ("llama_bias_llama3", 1, 64, 16),
    ],
)
def test_more_ranks_than_kv_heads(
    family: str, stages: int, chunk: int, count: int, checkpoint: Checkpoints, oracle: Oracles
) -> None:
    folder = checkpoint(family)
    with Pipeline(folder, stages, 4, chunk=chunk).keep_logits() as pipeline:
        assert pipeline.spec.num_key_value_heads == 2
        assert [shard.shard.kv_heads for shard in pipeline.shards[:4]] == [(0, 1), (0, 1), (1, 2), (1, 2)]
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size), count)


@pytest.mark.parametrize("page_size", [1, 7, 32])
def test_other_page_sizes(page_size: int, checkpoint: Checkpoints, oracle: Oracles) -> None:
    folder = checkpoint("qwen3_moe")
    with Pipeline(folder, 2, 2, chunk=37, page_size=page_size, pages=1024 // page_size).keep_logits() as pipeline:
        check_against(pipeline, oracle(folder), three_prompts(pipeline.spec.vocab_size))
