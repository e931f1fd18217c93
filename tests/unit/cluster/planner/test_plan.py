"""The plan of a model on hardware: what fits, the layout, times, and what is said about them."""

from __future__ import annotations

from bisect import bisect
from pathlib import Path
from typing import Any

import pytest

from cluster.config.topology import LayoutError
from cluster.latency.hardware import load_hardware
from cluster.planner.memory import refusal, relayout
from cluster.planner.plan import make_plan, recommend
from cluster.planner.target import cpu_target, gpu_target, have_target
from tests.support.planner.models import subject

TABLE = load_hardware()


def test_a_million_tokens_of_qwen3_30b_on_h200(tmp_path: Path):
    plan = make_plan(subject(tmp_path), 1 << 20, gpu_target(TABLE, "h200"))
    assert plan["fits"]
    assert plan["layout"] == {"stages": 2, "shards": 1, "devices": 2, "chunk": 2048}
    assert plan["longest_context"] > 1 << 20
    assert plan["model"]["kv_bytes_per_token"] == 96 << 10
    assert round(plan["model"]["active_parameters"] / 1e9, 2) == 3.35
    assert plan["prefill_s"]["dense"] > 5 * plan["prefill_s"]["sparse"] > 0
    assert 0.005 < plan["decode_s"] < 0.5
    assert any("positions cover 262,144" in note for note in plan["notes"])
    assert any("assumed" in note for note in plan["notes"])


def test_as_many_devices_as_are_needed_and_no_more(tmp_path: Path):
    given = subject(tmp_path)
    for context, devices in ((1 << 16, 1), (1 << 19, 1), (1 << 20, 2), (1 << 21, 4)):
        assert make_plan(given, context, gpu_target(TABLE, "h200"))["layout"]["devices"] == devices


def test_what_does_not_fit_says_why(tmp_path: Path):
    plan = make_plan(subject(tmp_path), 1 << 17, have_target(TABLE, "2x24GB"))
    assert not plan["fits"]
    assert plan["why_not"].startswith("the weights alone need")
    assert plan["longest_context"] == 0
    assert plan["prefill_s"] == {"dense": None, "sparse": None}
    assert plan["times_from"] is None


def test_devices_of_unknown_speed_are_stages(tmp_path: Path):
    assert recommend(subject(tmp_path), 1 << 17, have_target(TABLE, "8x24GB")).size == (8, 1)
    narrow = subject(tmp_path, num_hidden_layers=4)
    assert recommend(narrow, 1 << 17, have_target(TABLE, "8x24GB")).size == (4, 2)


def test_the_fastest_layout_is_taken(tmp_path: Path):
    target = gpu_target(TABLE, "4xh200")
    best = recommend(subject(tmp_path), 1 << 17, target)
    stages, shards = best.size
    assert stages * shards == 4
    for other in ((4, 1), (2, 2), (1, 4)):
        plan = make_plan(subject(tmp_path), 1 << 17, target, other)
        assert best.sparse is not None
        assert plan["prefill_s"]["sparse"] >= best.sparse.prefill_s


def test_a_host_is_shared_by_all_shards(tmp_path: Path):
    given = subject(tmp_path, "cpu")
    target = cpu_target(TABLE, "100GB", cores=8)
    plan = make_plan(given, 1 << 16, target)
    assert plan["fits"]
    assert plan["layout"]["stages"] == plan["layout"]["shards"] == plan["layout"]["devices"] == 1
    split = make_plan(given, 1 << 16, target, (2, 2))
    assert split["fits"]
    assert split["memory"]["total_bytes"] > plan["memory"]["total_bytes"]
    assert split["longest_context"] < plan["longest_context"]


# eight wide MLPs, each as much work as three layers of experts, in front of forty layers of experts
UNEVEN = {"mlp_only_layers": [*range(8)], "intermediate_size": 6144 * 4}


def layers(plan: dict[str, Any]) -> list[int]:
    return [shard["layers"] for shard in plan["memory"]["shards"]]


def test_stages_of_uneven_layers_are_balanced(tmp_path: Path):
    plan = make_plan(subject(tmp_path, **UNEVEN), 1 << 17, gpu_target(TABLE, "4xh200"), (4, 1))
    assert layers(plan) == [12, 12, 12, 12]
    assert any(note.startswith("stages have [12, 12, 12, 12] layers: the slowest takes ") for note in plan["notes"])
    unknown = make_plan(subject(tmp_path, **UNEVEN), 1 << 17, have_target(TABLE, "4x141GB"), (4, 1))
    assert layers(unknown) == [5, 11, 16, 16], "by weights where the speed is unknown"


def test_balanced_stages_that_do_not_fit_are_split_by_weights(tmp_path: Path):
    """All shards of a host have as many pages of KV, of which the largest belong to the stage with most layers."""
    shape = {"num_hidden_layers": 8, "vocab_size": 400_000, "hidden_size": 512, "moe_intermediate_size": 128}
    given = subject(tmp_path, "cpu", eos_token_id=2, **shape)
    plain = relayout(given, 2, 1)
    fits = bisect(range(1 << 34), 0, key=lambda memory: 0 if refusal(plain, 64, memory) else 1)
    tight = make_plan(given, 64, cpu_target(TABLE, str(fits), cores=2), (2, 1))
    assert (layers(tight), tight["fits"]) == ([4, 4], True)
    balanced = make_plan(given, 64, cpu_target(TABLE, "64GB", cores=2), (2, 1))
    first, last = layers(balanced)
    assert first > last, "the output head has most of the work of so short a prompt"
    assert f"stages of [{first}, {last}] layers would take more equal times, but do not fit" in tight["notes"]


def test_a_split_that_the_model_does_not_allow(tmp_path: Path):
    with pytest.raises(LayoutError, match="expert_parallel_size: 3"):
        make_plan(subject(tmp_path), 1024, gpu_target(TABLE, "h200"), (1, 3))
