"""The layers of each stage at a launch: the same at every start, and by weights where those by cost do not fit."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.common.errors import PreflightError, StageError
from cluster.config.deployment import Deployment
from cluster.config.memory_budget import kv_token_bytes
from cluster.engine.stage_split import balance_stages, launch_fitting
from cluster.latency.balance import stage_layers, with_layers
from cluster.latency.latency_file import FOLDER, LatencyFile
from cluster.latency.model import LatencyModel
from cluster.latency.pipeline_work import layer_works, measured_on, stage_times, stage_works, usual_costs
from cluster.latency.stage_times import layer_parts
from cluster.planner.memory import relayout
from cluster.stages.preflight import check_head
from protos.node.environment import usable_cores
from protos.stage.messages import SequenceSlice, StepPlan
from tests.support.planner.models import subject

CONTEXT = 1 << 15
# four wide MLPs in front of eight layers of experts: by weights 4 + 8, with attention over long contexts nearly even
UNEVEN = {"num_hidden_layers": 12, "mlp_only_layers": [*range(4)], "intermediate_size": 6144 * 3, "vocab_size": 1000}


def given_of(folder: Path, **cluster: object) -> Deployment:
    """A deployment that asks for 32K tokens, with its data in `folder`."""
    given = relayout(subject(folder, "cpu", eos_token_id=2, **UNEVEN), 2, 1)
    config = given.config.model_copy(
        update={
            "data_dir": folder / "data",
            "model": given.config.model.model_copy(update={"max_model_len": CONTEXT, "load_format": "dummy"}),
            "cluster": given.config.cluster.model_copy(update=cluster),
        }
    )
    return with_layers(replace(given, config=config, max_model_len=CONTEXT), None)


def leave_steps(given: Deployment, dense: float, experts: float) -> None:
    """Leave what a head leaves whose layers of both kinds take so many times as long as the table says."""
    usual = usual_costs(given, usable_cores())
    model = LatencyModel(given.spec, stage_works(given), usual, stage_times(given, usual))
    layers, works = iter(range(given.spec.num_hidden_layers)), layer_works(given)
    stages = [[next(layers) for _ in range(count)] for count in stage_layers(given)]
    for step in range(100):
        start, length = (step % 16) * 2048, 512 + 512 * (step % 4)
        plan = StepPlan(1, (SequenceSlice(0, start, length, CONTEXT, (), (), 1),))
        stage_s = {}
        for stage, own in enumerate(stages):
            parts = [layer_parts(works[layer], model.counts(plan), usual) for layer in own]
            factors = [experts if given.spec.is_moe_layer(layer) else dense for layer in own]
            stage_s[stage] = float(sum(f * rest + attn for f, (rest, attn) in zip(factors, parts, strict=True)))
        model.observe(plan, max(stage_s.values()), stage_s=stage_s)
    LatencyFile(given.config.data_dir, measured_on(given, "", usable_cores())).save(model)


def test_a_launch_is_balanced_and_the_next_one_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    given = given_of(tmp_path)
    assert stage_layers(given) == (4, 8)
    launched = balance_stages(given)
    assert stage_layers(launched) in ((5, 7), (6, 6))
    assert f"stages have {list(stage_layers(launched))} layers: the slowest takes" in caplog.text
    assert balance_stages(given_of(tmp_path)) == launched, "another head"
    caplog.clear()
    assert balance_stages(launched) == launched, "another runtime over the same deployment"


def test_what_was_measured_here_counts_at_the_next_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    given = given_of(tmp_path)
    leave_steps(given, dense=10.0, experts=1.0)
    assert stage_layers(balance_stages(given)) in ((2, 10), (3, 9))
    leave_steps(balance_stages(given), dense=1.0, experts=10.0)
    assert stage_layers(balance_stages(given)) == (7, 5)
    assert caplog.text.count("(200 times of stages measured here)") == 3
    for path in (given.config.data_dir / FOLDER).iterdir():
        path.write_text("{}")
    assert stage_layers(balance_stages(given)) in ((5, 7), (6, 6)), "by the table again"


def test_several_nodes_keep_the_split_by_the_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each has stored the KV of its own layers."""
    caplog.set_level(logging.INFO)
    given = given_of(tmp_path, address="auto")
    before = balance_stages(given)
    leave_steps(given, dense=1.0, experts=10.0)
    assert balance_stages(given) == before
    assert "cluster.stage_layers: [7, 5] gives the slowest" in caplog.text


def test_layers_that_the_yaml_gives_are_launched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    given = given_of(tmp_path, stage_layers=[11, 1])
    assert balance_stages(given) is given
    assert "the stages are uneven: cluster.stage_layers: [" in caplog.text


def with_kv_bytes(given: Deployment, kv_bytes: int) -> Deployment:
    kv = given.config.kv_cache.model_copy(update={"bytes": kv_bytes})
    return replace(given, config=given.config.model_copy(update={"kv_cache": kv}))


def test_a_split_that_does_not_fit_gives_way_to_the_one_by_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the YAML gives the bytes of KV, they hold the context only as long as no stage has more layers."""
    given = given_of(tmp_path)  # 4 and 8 layers
    given = with_kv_bytes(given, CONTEXT * kv_token_bytes(given))
    less = with_layers(given, [5, 7])
    assert launch_fitting(less, check_head) == (less, "")
    more = with_layers(given, [3, 9])
    plain, _ = launch_fitting(more, check_head)
    assert stage_layers(plain) == (4, 8)
    assert "stages of [3, 9] layers do not fit, they get [4, 8] (kv_cache: room for " in caplog.text
    with pytest.raises(PreflightError, match="kv_cache: room for"):
        launch_fitting(with_kv_bytes(more, 1 << 20), check_head)


def test_other_failures_change_no_split(tmp_path: Path) -> None:
    launched: list[Deployment] = []

    def launch(deployment: Deployment) -> None:
        launched.append(deployment)
        raise StageError("stage 0 is gone") if len(launched) == 1 else PreflightError("no room")

    given = with_layers(given_of(tmp_path), [6, 6])
    with pytest.raises(StageError):
        launch_fitting(given, launch)
    with pytest.raises(PreflightError):
        launch_fitting(with_layers(given, None), launch)
    assert len(launched) == 2, "the split by weights is not tried twice"
