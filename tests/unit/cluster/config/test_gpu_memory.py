"""The account of GPUs: what grows with what, and how a rehearsed step corrects it. Traced steps: workers/bench."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.common.errors import PreflightError
from cluster.config.deployment import Deployment
from cluster.config.gpu_memory import (
    FRAGMENTS,
    GRAPH_BYTES,
    LIBRARY_BYTES,
    GpuStep,
    gpu_scratch_bytes,
    largest_steps,
    link_bytes,
    most_columns,
    rehearsed_scratch_bytes,
    step_bytes,
)
from cluster.config.memory_budget import kv_budget, shard_scratch_bytes
from cluster.planner.memory import account
from protos.model.spec import HeadBudget, SparseSpec
from protos.stage.messages import LoadProgress
from tests.support.planner.models import subject

GIB = 1 << 30


@pytest.fixture
def given(tmp_path: Path) -> Deployment:
    return subject(tmp_path)


def test_staged_keys_grow_with_the_context_and_the_rest_with_tokens(given: Deployment) -> None:
    spec, (shard,) = given.spec, given.shards
    near, far = (step_bytes(spec, shard, GpuStep(8192, context)) for context in (500 * 1024, 1000 * 1024))
    assert far - near == 4 * 500 * 1024 * 4 * 128
    few, many = (step_bytes(spec, shard, GpuStep(tokens, 32768)) for tokens in (16384, 32768))
    assert many - 2 * few == pytest.approx(-(1 << 20), abs=4 * 256 * 4 * 128), "tables are there once"


def test_a_sparse_step_also_sums_over_the_context(given: Deployment) -> None:
    spec, (shard,) = given.spec, given.shards
    near, far = (step_bytes(spec, shard, GpuStep(32768, context, 1, 8192, 1000)) for context in (1 << 22, 1 << 23))
    a_key = (far - near) / (1 << 22)
    staged, sums = 4 * 4 * 128, 4 * 8 * 32  # of four KV heads; of four cells and 32 heads
    assert staged + sums < a_key < 1.05 * (staged + sums)


def test_the_largest_steps_are_dense_and_sparse(given: Deployment) -> None:
    spec = replace(given.spec, sparse=SparseSpec(threshold=1000, cell=64, uniform=HeadBudget(50, 60)))
    assert largest_steps(given.spec, 100, 5000, 2) == [GpuStep(100, 5000, 2)]
    assert largest_steps(spec, 100, 1000, 2) == [GpuStep(100, 1000, 2)]
    assert largest_steps(spec, 100, 5000, 2) == [GpuStep(100, 5000, 2), GpuStep(100, 5000, 2, 64, 50)]
    assert largest_steps(spec, 100, 30, 2) == [GpuStep(30, 30, 2)]


def test_the_most_columns_of_a_head(given: Deployment) -> None:
    def columns(sparse: SparseSpec) -> int:
        return most_columns(replace(given.spec, sparse=sparse), 5000)

    assert columns(SparseSpec(uniform=HeadBudget(50, 60))) == 50
    assert columns(SparseSpec(uniform=HeadBudget(50_000, 60))) == 5000
    assert columns(SparseSpec(patterns=((None, HeadBudget(7, 60)), (HeadBudget(9, 1), None)))) == 9
    assert columns(SparseSpec(patterns=((None,),))) == 0
    assert columns(SparseSpec()) == 5000, "adaptive"


def test_admission_and_plans_take_it(given: Deployment) -> None:
    (shard,) = given.shards
    prefill = given.config.prefill
    expected = gpu_scratch_bytes(
        given.spec, shard, prefill.max_num_batched_tokens, given.max_model_len, prefill.max_num_seqs
    )
    assert shard_scratch_bytes(given, shard) == expected
    assert account(given, given.max_model_len)[0].scratch_bytes == expected
    (step,) = largest_steps(given.spec, prefill.max_num_batched_tokens, given.max_model_len, prefill.max_num_seqs)
    assert expected == int(FRAGMENTS * step_bytes(given.spec, shard, step)) + LIBRARY_BYTES + GRAPH_BYTES


def test_hidden_states_on_their_way_count_whether_a_step_was_rehearsed_or_not(given: Deployment) -> None:
    """A receive is posted while the step before computes, and a step begins while the one before is being sent."""
    spec, (whole,) = given.spec, given.shards

    def steps(stage: int, stages: int) -> float:
        shard = replace(whole, stage=stage, num_stages=stages)
        return link_bytes(spec, shard, 1000) / (1000 * 2 * spec.hidden_size)

    assert [steps(stage, 2) for stage in range(2)] == [1, 1]
    assert [steps(stage, 8) for stage in (0, 3, 7)] == [4, 7, 4]
    assert steps(0, 1) == 0
    two = replace(given, shards=tuple(replace(whole, stage=stage, num_stages=2) for stage in range(2)))
    loaded = [LoadProgress(1, 1, True, 0, 60 * GIB, rehearsed_bytes=GIB)] * 2
    asked = replace(two, config=given.config.model_copy(update={
        "kv_cache": given.config.kv_cache.model_copy(update={"bytes": None, "fraction": 1.0})
    }))  # fmt: skip
    tokens = given.config.prefill.max_num_batched_tokens
    left = 60 * GIB - rehearsed_scratch_bytes(GIB) - 2 * tokens * spec.hidden_size
    assert kv_budget(asked, loaded, 1) == left


def test_a_rehearsed_step_corrects_the_account(given: Deployment) -> None:
    def budget(rehearsed: int) -> int:
        kv = given.config.kv_cache.model_copy(update={"fraction": 1.0})
        asked = replace(given, config=given.config.model_copy(update={"kv_cache": kv}))
        return kv_budget(asked, [LoadProgress(1, 1, True, 0, 60 * GIB, rehearsed_bytes=rehearsed)], 1)

    assert budget(0) == 60 * GIB - shard_scratch_bytes(given, given.shards[0])
    assert budget(5 * GIB) == 60 * GIB - rehearsed_scratch_bytes(5 * GIB)
    assert rehearsed_scratch_bytes(5 * GIB) == int(5 * GIB * FRAGMENTS) + GRAPH_BYTES
    with pytest.raises(
        PreflightError, match=r"kv_cache.fraction: no room: after the weights and 66.5GiB for a step of"
    ):
        budget(60 * GIB)
