"""Layers of each stage by what they cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.config.deployment import Deployment
from cluster.latency.balance import better_split, layer_seconds, split_stages, stage_layers, with_layers
from cluster.latency.hardware import load_hardware
from cluster.latency.measured import Costs
from cluster.planner.forecast import predict
from cluster.planner.memory import relayout
from cluster.planner.subject import with_chunks
from cluster.planner.target import cpu_target, gpu_target
from tests.support.planner.models import subject

GPUS = gpu_target(load_hardware(), "4xh200")
AMX = Costs(load_hardware()["cpu-amx"].costs(1, sharers=2), "hardware table")
# eight wide MLPs, each as much work as three layers of experts, in front of forty layers of experts
UNEVEN = {"mlp_only_layers": [*range(8)], "intermediate_size": 6144 * 4}
BIG_HEAD = {  # of Qwen3-0.6B: as many weights as ten layers
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024,
    "num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 3072, "num_experts": 0,
    "num_experts_per_tok": 0, "tie_word_embeddings": True,
}  # fmt: skip


def given_of(folder: Path, stages: int, device: str = "cpu", **changes: object) -> Deployment:
    return relayout(subject(folder, device, **changes), stages, 1)


def changed(deployment: Deployment, section: str, **keys: object) -> Deployment:
    """The deployment of a YAML that says so."""
    config = deployment.config
    part = getattr(config, section).model_copy(update=keys)
    return replace(deployment, config=config.model_copy(update={section: part}))


@pytest.mark.parametrize(("stages", "layers"), [(2, [24] * 2), (4, [12] * 4), (5, [10] * 3 + [9] * 2)])
@pytest.mark.parametrize("context", [1 << 12, 1 << 17, 1 << 20])
@pytest.mark.parametrize("costs", [AMX, GPUS])
def test_equal_layers_are_split_evenly_already(
    tmp_path: Path, stages: int, layers: list[int], context: int, costs: Any
) -> None:
    given = given_of(tmp_path, stages, "cpu" if costs is AMX else "cuda")
    split, notes = split_stages(given, context, AMX) if costs is AMX else GPUS.split(given, context)
    assert split == given
    assert (list(stage_layers(split)), notes) == (layers, [])


def test_the_seconds_of_layers_are_those_of_the_stages(tmp_path: Path) -> None:
    given = given_of(tmp_path, 1, "cuda", **UNEVEN)
    costs = GPUS.costs_of(given)
    assert sum(layer_seconds(given, 10_000, costs)) == pytest.approx(predict(given, 10_000, costs).prefill_s)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("context", [1 << 12, 1 << 17])
def test_uneven_layers_are_moved_until_the_slowest_stage_has_least(tmp_path: Path, context: int, device: str) -> None:
    """By weights alone the first stages get few layers; with a long context attention counts as much for each."""
    given = given_of(tmp_path, 4, device, **UNEVEN)
    assert stage_layers(given) == (5, 11, 16, 16)
    split, notes = split_stages(given, context, AMX)
    layers = stage_layers(split)
    assert (len(layers), sum(layers)) == (4, 48)
    seconds = layer_seconds(given, context, AMX)
    slowest = max(sum(seconds[sum(layers[:at]) : sum(layers[: at + 1])]) for at in range(4))
    assert slowest < 1.1 * sum(seconds) / 4
    (note,) = notes
    assert note.startswith(f"stages have {list(layers)} layers: the slowest takes ")
    assert note.endswith("less time than with [5, 11, 16, 16] (hardware table)")
    assert split.config == given.config, "the YAML's key stays empty"


def test_layers_of_experts_between_dense_ones(tmp_path: Path) -> None:
    given = given_of(tmp_path, 3, num_hidden_layers=12, decoder_sparse_step=2, intermediate_size=6144 * 4)
    split, notes = split_stages(given, 1 << 15, AMX)
    assert (split, notes) == (given, []), "every pair of layers has as much work"
    given = given_of(tmp_path, 4, num_hidden_layers=12, decoder_sparse_step=3, intermediate_size=6144 * 4)
    assert stage_layers(split_stages(given, 1 << 15, AMX)[0]) == (3, 3, 3, 3)


@pytest.mark.parametrize(("context", "layers"), [(64, (16, 12)), (256, (15, 13)), (512, (14, 14)), (1 << 15, (14, 14))])
def test_a_large_output_head_counts_for_one_row_of_a_prompt(
    tmp_path: Path, context: int, layers: tuple[int, ...]
) -> None:
    """It is read once a prompt, which is much of a short one and nothing of a long one."""
    assert stage_layers(split_stages(given_of(tmp_path, 2, **BIG_HEAD), context, AMX)[0]) == layers


def test_a_gain_below_three_percent_moves_nothing(tmp_path: Path) -> None:
    given = with_chunks(given_of(tmp_path, 2, **UNEVEN), False)
    best = better_split(given, 1 << 12, AMX)
    assert best is not None
    near = with_layers(given, [best.layers[0] - 1, best.layers[1] + 1])
    seconds = layer_seconds(given, 1 << 12, AMX)
    assert sum(seconds[: best.layers[0]]) > 0.97 * sum(seconds[best.layers[0] - 1 :]), "one layer is that little"
    assert better_split(near, 1 << 12, AMX) is None


def test_layers_that_the_yaml_gives_stay(tmp_path: Path) -> None:
    given = changed(given_of(tmp_path, 2, **UNEVEN), "cluster", stage_layers=[40, 8])
    given = with_layers(given, None)
    assert stage_layers(given) == (40, 8)
    split, (note,) = split_stages(given, 1 << 17, AMX)
    assert split == given
    assert note.startswith("the stages are uneven: cluster.stage_layers: [23, 25] gives the slowest ")
    assert note.endswith("less to do in a prefill (hardware table)")


def measured(deployment: Deployment) -> Costs:
    """Attention costs nothing here, so the split by weights is right."""
    assert deployment.spec.num_experts
    return Costs((0.0, 0.0, 1e-12, 0.0, 0.0, 0.0, 0.0), "100 steps measured here")


def test_layers_of_each_kind_may_take_longer_than_their_units_say(tmp_path: Path) -> None:
    given = given_of(tmp_path, 2, **UNEVEN)
    usual, slow = (layer_seconds(given, 1 << 14, replace(AMX, parts=parts)) for parts in ((1, 1, 1), (3, 1, 2)))
    attention = slow[-1] - usual[-1]
    assert slow[0] == pytest.approx(3 * (usual[0] - attention) + 2 * attention)
    assert slow[8] == pytest.approx(usual[8] + attention)


def test_measured_costs_go_before_the_table(tmp_path: Path) -> None:
    given = changed(given_of(tmp_path, 2, **UNEVEN), "model", max_model_len=1 << 17)
    assert stage_layers(split_stages(given, 1 << 17, AMX)[0]) == (23, 25)
    split, (note,) = split_stages(given, 1 << 17, AMX, measured(given))
    assert stage_layers(split) == (16, 32)
    assert note.startswith("stages have [16, 32] layers: the slowest takes ")
    assert note.endswith("less time than with [23, 25] (100 steps measured here)")
    assert split_stages(split, 1 << 17, AMX, measured(given))[0] == split, "wherever it begins"


def test_measured_times_that_scatter_leave_the_split_by_the_table(tmp_path: Path) -> None:
    """Five percent and more are no scatter."""
    given = changed(given_of(tmp_path, 2, **UNEVEN), "model", max_model_len=1 << 17)
    found = [
        stage_layers(split_stages(given, 1 << 17, AMX, replace(AMX, parts=(dense, 1.0, 1.0)))[0])
        for dense in (0.8, 0.9, 1.1, 1.3, 4.0)
    ]
    assert found[:4] == [(23, 25)] * 4
    assert found[4] == (20, 28)


@pytest.mark.parametrize("case", ["several nodes", "a context that KV limits"])
def test_measured_costs_are_only_said_where_another_split_would_take_something_away(tmp_path: Path, case: str) -> None:
    given = given_of(tmp_path, 2, **UNEVEN)
    if case == "several nodes":
        given = changed(changed(given, "model", max_model_len=1 << 17), "cluster", address="auto")
    split, notes = split_stages(given, 1 << 17, AMX, measured(given))
    assert stage_layers(split) == (23, 25), "by the table, whatever was measured"
    assert notes[0].endswith("(hardware table)")
    assert notes[1].startswith("the stages are uneven: cluster.stage_layers: [16, 32] gives the slowest ")
    assert notes[1].endswith("(100 steps measured here)")


def test_no_gpu_gets_more_weights_than_the_fullest_has_by_weights(tmp_path: Path) -> None:
    """They are loaded before admission can refuse them; a host's shards share its memory."""
    for device, address, layers in (("cpu", "local", (16, 12)), ("cpu", "auto", (14, 14)), ("cuda", "local", (14, 14))):
        given = changed(given_of(tmp_path, 2, device, **BIG_HEAD), "cluster", address=address)
        split, notes = split_stages(given, 64, AMX)
        assert stage_layers(split) == layers, (device, address)
        assert len(notes) == 1
    assert notes[0].startswith("the stages are uneven: cluster.stage_layers: [16, 12] gives"), "whoever has the room"


def test_one_stage_has_all_layers(tmp_path: Path) -> None:
    given = given_of(tmp_path, 1, **UNEVEN)
    assert split_stages(given, 1 << 17, AMX) == (given, [])


def test_a_plan_has_the_split_of_a_launch(tmp_path: Path) -> None:
    given = given_of(tmp_path, 2, **UNEVEN)
    target = cpu_target(load_hardware(), "64GB", cores=2)
    split, notes = target.split(given, 1 << 17)
    assert stage_layers(split) == (23, 25)
    assert "hardware table: 1 x" in notes[0]
