"""Layers of each stage by what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.latency.balance import balanced_layers, layer_seconds
from cluster.latency.hardware import load_hardware
from cluster.planner.forecast import predict
from cluster.planner.memory import relayout
from cluster.planner.plan import make_plan
from cluster.planner.target import gpu_target
from tests.support.planner.models import subject

TARGET = gpu_target(load_hardware(), "4xh200")
# eight wide MLPs, each as much work as three layers of experts, in front of forty layers of experts
UNEVEN = {"mlp_only_layers": [*range(8)], "intermediate_size": 6144 * 4}


def test_equal_layers_are_split_evenly_already(tmp_path: Path) -> None:
    given = relayout(subject(tmp_path), 4, 1)
    assert balanced_layers(given, 1 << 17, TARGET.costs_of(given)) is None


def test_the_seconds_of_layers_are_those_of_the_stages(tmp_path: Path) -> None:
    given = relayout(subject(tmp_path, **UNEVEN), 1, 1)
    costs = TARGET.costs_of(given)
    assert sum(layer_seconds(given, 10_000, costs)) == pytest.approx(predict(given, 10_000, costs).prefill_s)


@pytest.mark.parametrize("context", [1 << 12, 1 << 17])
def test_uneven_layers_are_moved_until_the_slowest_stage_has_least(tmp_path: Path, context: int) -> None:
    """By weights alone the first stages get few layers; with a long context attention counts as much for each."""
    given = relayout(subject(tmp_path, **UNEVEN), 4, 1)
    costs = TARGET.costs_of(given)
    better = balanced_layers(given, context, costs)
    assert better is not None
    assert (len(better), sum(better)) == (4, 48)
    seconds = layer_seconds(given, context, costs)
    slowest = max(sum(seconds[sum(better[:at]) : sum(better[: at + 1])]) for at in range(4))
    assert slowest < 1.1 * sum(seconds) / 4
    note = f"cluster.stage_layers: {better}"
    assert any(note in one for one in make_plan(given, context, TARGET, (4, 1))["notes"])
