"""The account equals published sizes, and fits exactly what admission accepts."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.memory_budget import kv_token_bytes, shard_scratch_bytes
from cluster.planner.memory import (
    CONTEXTS,
    account,
    longest_context,
    precision_bytes,
    precision_table,
    refusal,
    relayout,
)
from cluster.planner.subject import load_subject
from tests.support.paths import CONFIGS
from tests.support.planner.models import subject

GB, GIB = 10**9, 2**30


def test_published_figures_of_qwen3_30b(tmp_path: Path):
    given = subject(tmp_path)
    (shard,) = account(given, 1 << 20)
    assert shard.parameters == 30_532_122_624
    assert round(shard.weight_bytes / GB, 1) == 61.1
    assert kv_token_bytes(given) == 96 << 10
    assert shard.kv_bytes == 96 * GIB
    assert shard.total_bytes == shard.weight_bytes + shard.kv_bytes + shard.scratch_bytes
    assert account(subject(tmp_path, "cpu"), 1)[0].process_bytes == 100 << 20, "a GPU reserves it in its row"


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 4), (4, 2), (5, 1)])
def test_shards_add_up_to_the_whole(tmp_path: Path, layout: tuple[int, int]):
    given = relayout(subject(tmp_path), *layout)
    shards = account(given, 1000)
    assert len(shards) == layout[0] * layout[1]
    assert sum(shard.layers for shard in shards) == 48 * layout[1]
    pages = -(-1000 // 64) * 64
    assert sum(shard.kv_bytes for shard in shards) == pages * (96 << 10)
    whole = account(relayout(given, 1, 1), 1000)[0].parameters
    assert 0 <= sum(shard.parameters for shard in shards) / whole - 1 < 0.002, "norms and routers are at every rank"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", [(1, 1), (2, 2)])
def test_the_longest_context_fits_and_a_page_more_does_not(tmp_path: Path, device: str, layout: tuple[int, int]):
    given = relayout(subject(tmp_path, device), *layout)
    memory = 80 * GIB if device == "cpu" else 80 * GIB // (layout[0] * layout[1])
    longest = longest_context(given, memory)
    assert longest % 64 == 0
    assert 60_000 < longest < 260_000
    assert refusal(given, longest, memory) == ""
    assert "model.max_model_len is" in refusal(given, longest + 64, memory)
    shards = account(given, longest)
    held = sum(s.total_bytes for s in shards) if device == "cpu" else max(s.total_bytes for s in shards)
    assert 0.8 * memory < held <= memory


def test_what_the_yaml_says_of_kv_counts():
    given = load_subject(CONFIGS / "single.yaml")
    assert longest_context(given, 8 * GIB) == (256 << 20) // kv_token_bytes(given)
    assert refusal(given, 4096, 400 << 20) == "", "of this context alone"
    assert "kv_cache.bytes: 128MiB" in refusal(given, 4096, 300 << 20)


def test_weights_that_do_not_fit(tmp_path: Path):
    given = subject(tmp_path)
    assert refusal(given, 1, 50 * GIB) == "the weights alone need 6.87GiB more"
    assert longest_context(given, 50 * GIB) == 0
    assert longest_context(given, 1 << 60) == 1 << 24, "the search ends somewhere"


def test_scratch_is_that_of_admission(tmp_path: Path):
    given = relayout(subject(tmp_path), 2, 1)
    for shard, held in zip(given.shards, account(given, given.max_model_len), strict=True):
        assert held.scratch_bytes == shard_scratch_bytes(given, shard)


def test_the_table_of_precisions(tmp_path: Path):
    given = subject(tmp_path)
    rows = {row["precision"]: row for row in precision_table(given)}
    assert list(rows) == ["bf16", "fp8", "int8", "int4"]
    assert list(rows["bf16"]["totals"]) == list(CONTEXTS) == [1024, 65536, 131072, 262144, 524288, 1048576]
    assert rows["bf16"]["weight_bytes"] == account(given, 1)[0].weight_bytes
    assert rows["bf16"]["totals"][1 << 18] == rows["bf16"]["weight_bytes"] + 24 * GIB
    products = 48 * (2048 * 128 * 2 * (32 + 4) + 128 * 3 * 2048 * 768)
    rest = 2 * (account(given, 1)[0].parameters - products)
    assert precision_bytes(given.spec, "fp8") == products + rest
    assert precision_bytes(given.spec, "int4") == round(products * (0.5 + 2 / 128)) + rest


def test_int8_kv_is_in_the_table(tmp_path: Path):
    subject(tmp_path)
    given = load_subject(tmp_path, kv="int8")
    row = precision_table(given)[0]
    assert row["totals"][1 << 20] - row["weight_bytes"] == (1 << 20) * 2 * 48 * 4 * (128 + 4)
