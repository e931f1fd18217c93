"""Options are checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.planner.request import PlanRequest, plan_for
from protos.errors import UserError
from tests.support.paths import CONFIGS
from tests.support.planner.models import config_json


def ask(path: Path, **options: Any) -> dict[str, Any]:
    return plan_for(PlanRequest(path, **options))


def test_defaults_are_this_machine_and_all_positions(tmp_path: Path):
    plan = ask(config_json(tmp_path, num_hidden_layers=1, num_experts=8, vocab_size=1000, eos_token_id=2))
    assert plan["context"] == 262_144
    assert plan["hardware"]["kind"] == "cpu"


def test_a_yaml_keeps_its_split():
    plan = ask(CONFIGS / "demo.yaml", cpu="8GB", context=65_536)
    assert plan["layout"]["stages"] == plan["layout"]["shards"] == 2
    assert ask(CONFIGS / "demo.yaml", cpu="8GB", layout="1x2")["layout"]["shards"] == 2
    assert ask(CONFIGS / "demo.yaml", gpu="rtx3090", context=65_536)["layout"]["devices"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu": "h200", "cpu": "8GB"}, "--gpu and --cpu: give one of them"),
        ({"gpu": "h200", "cores": 4}, "--cores: is for --cpu"),
        ({"context": 0}, "--context: 0: must be from 1 to"),
        ({"context": 1 << 30}, "--context: 1073741824: must be from 1 to"),
        ({"layout": "2by1"}, "--layout: '2by1': must be STAGESxSHARDS"),
        ({"layout": "9x1"}, "pipeline_parallel_size: 9: must be between 1 and 4"),
        ({"chunk": 1}, "--chunk: 1: must be at least 16"),
        ({"gpu": "gtx"}, "gpu: gtx: must be one of"),
        ({"cpu": "lots"}, "'lots': must be a size in bytes"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        ask(CONFIGS / "needle", **options)


def test_a_yaml_for_gpus_needs_their_name(tmp_path: Path):
    config_json(tmp_path)
    path = tmp_path / "gpu.yaml"
    path.write_text("model: {path: .}\ncluster: {device: cuda, pipeline_parallel_size: 4}\n")
    with pytest.raises(UserError, match="is for GPUs: name them with --gpu or --have, or say --cpu"):
        ask(path)
    assert ask(path, gpu="a100", context=1024)["layout"]["devices"] == 1
    assert ask(path, cpu="200GB", context=1024)["layout"]["stages"] == 4
