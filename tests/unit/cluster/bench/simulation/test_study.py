"""The table and the series of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.simulation.study import draw_study, study, table
from cluster.latency.hardware import load_hardware
from cluster.planner.target import gpu_target
from protos.errors import UserError
from tests.support.planner.models import subject


def made(folder: Path, stages: tuple[int, ...] = (1, 2, 4), sparse: bool = False) -> dict[str, object]:
    given = subject(folder, num_hidden_layers=8)
    return study(given, gpu_target(load_hardware(), "h200").costs_of, 32_768, stages, sparse)


def test_rows_and_series_agree(tmp_path: Path):
    result: dict = made(tmp_path)
    first, second, third = (row["fixed"] for row in result["rows"])
    assert first["efficiency"] == pytest.approx(1.0, abs=1e-3)
    assert 1.0 > second["efficiency"] > third["efficiency"] > 0.5
    for name in ("fixed", "dynamic"):
        assert result["plot"][name]["efficiency"] == [row[name]["efficiency"] for row in result["rows"]]
        bars = result["timelines"][name]
        assert {bar[0] for bar in bars} == {0, 1, 2, 3}
        assert len(bars) == 4 * result["rows"][2][name]["chunks"]
    assert result["times_from"] == "hardware table: NVIDIA H200 SXM"


def test_the_table_has_a_line_for_each_number_of_stages(tmp_path: Path):
    lines = table(made(tmp_path, (1, 8), sparse=True))
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| 1", "| 8"]
    assert len({line.count("|") for line in lines}) == 1


def test_more_stages_than_layers(tmp_path: Path):
    with pytest.raises(UserError, match="--stages: 16: must be at most 8, the layers of the model"):
        made(tmp_path, (1, 16))


def test_the_picture(tmp_path: Path):
    pytest.importorskip("matplotlib")
    draw_study(made(tmp_path), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
