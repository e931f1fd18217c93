"""Stages have works, and measured times a key of hardware and model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cluster.config.deployment import load_deployment
from cluster.latency.balance import with_layers
from cluster.latency.hardware import load_hardware
from cluster.latency.pipeline_work import (
    dynamic_chunks,
    layer_works,
    measured_on,
    prompt_steps,
    stage_times,
    stage_works,
    usual_costs,
)
from cluster.latency.step_work import UNITS, StepCounts
from tests.support.paths import CONFIGS

DEMO = CONFIGS / "demo.yaml"


def test_every_stage_has_its_work():
    works = stage_works(load_deployment(DEMO))
    assert [work.layers for work in works] == [2, 2]
    first, last = (dict(zip(UNITS, work.units(StepCounts(1, 1, 10, 10, 0)), strict=True)) for work in works)
    assert last["weight_bytes"] > first["weight_bytes"], "the output head"


def test_the_work_of_layers_is_that_of_the_stages():
    given = load_deployment(DEMO)
    counts = StepCounts(512, 1, 700, 9000, 0)
    layers = [np.array(work.units(counts)) for work in layer_works(given)]
    stages = [np.array(work.units(counts)) for work in stage_works(given)]
    assert np.allclose(sum(layers), sum(stages))
    assert layers[-1][2] > layers[0][2] == layers[1][2], "the output head"


def test_stages_are_told_apart_where_they_have_layers_of_two_kinds():
    given = load_deployment(DEMO)
    usual = usual_costs(given, 2)
    assert stage_times(given, usual) is None, "all have experts"
    mixed = replace(given, spec=replace(given.spec, mlp_only_layers=(0, 3), intermediate_size=4096))
    mixed = with_layers(mixed, [1, 3])
    times = stage_times(mixed, usual)
    assert times is not None
    counts = StepCounts(512, 0, 700, 9000, 0)
    works = layer_works(mixed)
    dense, experts = (float(work.seconds(counts, usual)) for work in works[:2])
    for _ in range(20):
        times.observe(counts, {0: 2 * dense, 1: 2 * (dense + 2 * experts)})
    assert times.scales == pytest.approx((2, 2, 2), rel=1e-3)
    one = load_deployment(DEMO, {"cluster.pipeline_parallel_size": 1})
    assert stage_times(replace(one, spec=mixed.spec), usual) is None, "one stage"


def test_kv_has_its_own_width():
    plain, small = (
        dict(zip(UNITS, stage_works(load_deployment(DEMO, given))[0].units(StepCounts(1, 0, 100, 0, 0)), strict=True))
        for given in ({}, {"kv_cache.dtype": "int8"})
    )
    dim = load_deployment(DEMO).spec.head_dim
    assert small["kv_bytes"] / plain["kv_bytes"] == (1 + 4 / dim) / 2


def test_a_pipeline_has_dynamic_chunks_unless_they_are_switched_off():
    dense: dict[str, object] = {"sparse.enabled": False, "prefill.max_num_batched_tokens": 512}
    given = load_deployment(DEMO, dense)
    dynamic = dynamic_chunks(given)
    assert dynamic is not None
    spec = given.spec
    assert (dynamic.stages, dynamic.budget) == (2, 512)
    assert dynamic.pair == 2 * spec.num_hidden_layers * spec.num_attention_heads * spec.head_dim
    assert dynamic.row > spec.num_hidden_layers * spec.hidden_size * spec.moe_intermediate_size
    lengths = [step.stop - step.start for step in prompt_steps(given, 65536)]
    assert max(lengths) == 512 > lengths[-2]
    for change in ({"prefill.dynamic_chunks": False}, {"cluster.pipeline_parallel_size": 1}):
        fixed = load_deployment(DEMO, dense | change)
        assert dynamic_chunks(fixed) is None
        assert {step.stop - step.start for step in prompt_steps(fixed, 65536)} == {512}


def test_the_key_names_hardware_and_model():
    base = measured_on(load_deployment(DEMO), "avx512", 8)
    assert (base.cores, base.threads, base.stages, base.shards) == (8, 1, 2, 2)
    assert base.key == measured_on(load_deployment(DEMO), "amx", 8).key, "the processor says enough"
    for change in (
        {"cluster.threads_per_actor": 3},
        {"kv_cache.dtype": "int8"},
        {"model.dtype": "float32"},
        {"cluster.pipeline_parallel_size": 1},
        {"sparse.enabled": False},
    ):
        assert measured_on(load_deployment(DEMO, change), "avx512", 8).key != base.key, change
    gpu = measured_on(load_deployment(DEMO, {"cluster.device": "cuda"}), "cuda-9.0", 8)
    assert gpu.hardware.startswith("cuda-9.0 at ")
    assert gpu.threads == 1


def test_usual_costs_are_of_one_shard_here():
    rows = load_hardware().values()
    on_two, on_four = (
        usual_costs(load_deployment(DEMO, {"cluster.threads_per_actor": threads}), 8) for threads in (2, 4)
    )
    assert on_two in [row.costs(2, sharers=4) for row in rows if row.kind == "cpu"], "four actors share the memory"
    assert on_four[2] == on_two[2] / 2
    gpu = usual_costs(load_deployment(DEMO, {"cluster.device": "cuda"}), 8)
    assert gpu in [row.costs() for row in rows if row.kind == "gpu"]
