"""Stages that wait instead of computing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protos.stage.messages import SampleSpec, SamplingParams, SequenceSlice, Span, StepPlan
from tests.unit.workers.runner.test_model_runner import CPU, PAGE, SPEC
from workers.kv.paged import PagedKV
from workers.model.weights import dummy_shard, whole_model
from workers.runner import paced
from workers.runner.paced import VARIABLE, PacedRunner, read_pace
from workers.transport.collectives import Collectives


def test_without_the_variable_stages_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert read_pace(0) is None


def test_times_are_those_of_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pace.json"
    path.write_text(json.dumps({"0": {"0:64": 0.5}, "1": {"0:64": 1}}))
    monkeypatch.setenv(VARIABLE, str(path))
    assert (read_pace(0), read_pace(1)) == ({"0:64": 0.5}, {"0:64": 1.0})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"0": 1}', '{"0": {"a": "b"}}'])
def test_another_file_is_one_line(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pace.json"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ValueError, match=r"^LONGREACH_PACE: .*pace.json: has no times of stage 0 \("):
        read_pace(0)


@pytest.mark.parametrize("shard", ["first", "last"])
def test_a_chunk_takes_its_time_and_gives_zeros(shard: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(paced.time, "sleep", slept.append)
    runner = paced_runner(shard, {"0:17": 0.25, "17:2": 9.0})
    part = SequenceSlice(1, 0, 17, 17, [3] * 17, [0, 1], 2, SampleSpec(SamplingParams(), 0))
    out = runner.execute(StepPlan(1, (part,)), None if shard == "first" else torch.zeros(17, runner.hidden_size))
    assert slept == [0.25]
    if shard == "first":
        assert out.hidden is not None
        assert out.hidden.shape == (17, runner.hidden_size)
        assert not out.hidden.any()
    else:
        assert [sample.token_id for sample in out.samples] == list(out.tokens) == [0]


def paced_runner(place: str, seconds: dict[str, float]) -> PacedRunner:
    stage = 0 if place == "first" else 1
    shard = replace(whole_model(SPEC), stage=stage, num_stages=2, layers=Span(stage, stage + 1))
    kv = PagedKV(1, 2, 32, 2, PAGE, torch.float32)
    weights = dummy_shard(SPEC, shard, torch.float32, CPU)
    return PacedRunner(SPEC, shard, weights, kv, Collectives(), CPU, seconds=seconds)
