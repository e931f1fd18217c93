"""What was learned survives a restart; damage costs the memory and nothing else."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.latency.latency_file import LatencyFile, Measured, measured_files
from cluster.latency.model import LatencyModel
from protos.stage.messages import SequenceSlice, StepPlan

OF = Measured("a processor", 2, 2, 1, 1, "digest", "", "bfloat16", "bfloat16")


def plan(start: int, length: int) -> StepPlan:
    return StepPlan(1, (SequenceSlice(0, start, length, 1 << 20, (), (), 1),))


def learned(scale: float = 1.0) -> LatencyModel:
    model = LatencyModel()
    for start in range(0, 20_000, 1000):
        model.observe(plan(start, 1000), scale * (0.1 + start * 1e-6))
        model.observe(plan(start, 1), scale * (0.01 + start * 1e-8))
    return model


def test_a_new_run_predicts_as_the_last_one(tmp_path: Path):
    model, fresh = learned(), LatencyModel()
    LatencyFile(tmp_path, OF).save(model)
    assert LatencyFile(tmp_path, OF).load(fresh)
    assert fresh.num_steps == 40
    for step in (plan(50_000, 1000), plan(50_000, 1), plan(0, 17)):
        assert fresh.predict(step) == pytest.approx(model.predict(step))
    assert not LatencyFile(tmp_path, replace(OF, threads=1)).load(LatencyModel()), "other hardware"


def test_the_file_is_private_and_replaced_as_a_whole(tmp_path: Path):
    file = LatencyFile(tmp_path, OF)
    file.save(learned())
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700
    file.save(learned(2.0))
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]


def test_nothing_is_written_without_new_steps_and_only_sometimes(tmp_path: Path):
    now = [0.0]
    file, model = LatencyFile(tmp_path, OF, lambda: now[0]), LatencyModel()
    file.save(model)
    assert not file.path.exists()
    model.observe(plan(0, 10), 1.0)
    file.save_sometimes(model)
    assert not file.path.exists()
    now[0] = 61.0
    file.save_sometimes(model)
    before = file.path.read_text()
    now[0] = 122.0
    file.save_sometimes(model)
    assert file.path.read_text() == before
    model.observe(plan(0, 10), 1.0)
    file.save_sometimes(model)
    assert file.path.read_text() != before


def damage(content: dict[str, Any], what: str) -> str:
    if what == "cut":
        return json.dumps(content)[:100]
    if what == "list":
        return "[1]"
    if what == "version":
        content["schema"] = 99
    if what == "units":
        content["learned"]["units"] = ["seconds"]
    if what == "shape":
        content["learned"]["prefill"]["gram"] = [[1.0]]
    if what == "infinite":
        content["learned"]["decode"]["moment"][0] = float("inf")
    if what == "text":
        content["learned"]["visited"] = ["a", 0, 0, 0, 0]
    if what == "steps":
        content["learned"]["prefill"]["steps"] = "many"
    if what == "gone":
        del content["learned"]
    return json.dumps(content)


@pytest.mark.parametrize("what", ["cut", "list", "version", "units", "shape", "infinite", "text", "steps", "gone"])
def test_a_damaged_file_is_left_out(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture):
    file = LatencyFile(tmp_path, OF)
    file.save(learned())
    file.path.write_text(damage(json.loads(file.path.read_text()), what))
    model = LatencyModel()
    assert not LatencyFile(tmp_path, OF).load(model)
    assert model.num_steps == 0
    assert model.predict(plan(0, 9)) == 0
    assert "times are learned anew" in caplog.text


def test_a_folder_that_cannot_be_written_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "latency").write_text("a file")
    LatencyFile(tmp_path, OF).save(learned())
    assert "cannot be written" in caplog.text


def test_files_are_found(tmp_path: Path):
    assert list(measured_files(tmp_path)) == []
    others = [OF, replace(OF, model="another"), replace(OF, stages=2)]
    for of in others:
        LatencyFile(tmp_path, of).save(learned())
    (tmp_path / "latency" / "broken.json").write_text("{")
    found = dict(measured_files(tmp_path))
    assert set(found) == set(others)
    model = LatencyModel()
    model.restore(found[OF])
    assert model.num_steps == 40
