"""The commands write a dated file and say by their exit code whether bounds were kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.bench.planning import commands
from cluster.bench.planning.check import Amount
from tests.support.planner.models import config_json


@pytest.mark.parametrize("met", [True, False])
def test_plan_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, met: bool):
    asked: list[Any] = []

    def check(*given: Any) -> dict[str, Any]:
        asked.append(given[:3])
        return {"rows": [], "met": met}

    monkeypatch.setattr(commands, "check_plan", check)
    out = tmp_path / "result.json"
    options = ["--model", str(tmp_path), "--length", "8K", "--json", str(out)]
    result = CliRunner().invoke(commands.plan_check, options)
    assert result.exit_code == (0 if met else 1)
    assert asked == [(tmp_path, Amount(8192, 2048, 256, repeats=3), None)]
    assert json.loads(out.read_text())["what"] == "longreach plan against measurement"


@pytest.mark.parametrize(("error", "code"), [(0.05, 0), (-0.2, 1)])
def test_simulate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: float, code: int):
    monkeypatch.setattr(commands, "check_stages", lambda *given: [{"stages": 1, "error": error}])
    model, out = str(config_json(tmp_path, num_hidden_layers=4)), tmp_path / "result.json"
    options = [model, "--context", "16K", "--stages", "1,4", "--gpu", "h200", "--check", "8K", "--json", str(out)]
    result = CliRunner().invoke(commands.simulate, options)
    assert result.exit_code == code, result.output
    content = json.loads(out.read_text())
    assert [row["stages"] for row in content["rows"]] == [1, 4]
    assert content["real"] == [{"stages": 1, "error": error}]


@pytest.mark.parametrize(("error", "code"), [(-0.09, 0), (0.11, 1)])
def test_simulate_beside_processes_that_wait(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: float, code: int
):  # fmt: skip
    asked: list[Any] = []
    monkeypatch.setattr(commands, "check_processes", lambda *given: asked.append(given[2:6]) or {"error": error})
    model = str(config_json(tmp_path, num_hidden_layers=4))
    options = [model, "--context", "16K", "--stages", "1,4", "--gpu", "h200", "--processes", "4", "--repeats", "2"]
    assert CliRunner().invoke(commands.simulate, options).exit_code == code
    assert asked == [(16_384, 2048, 4, 2)]


@pytest.mark.parametrize("met", [True, False])
def test_eta(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, met: bool):
    asked: list[Any] = []
    monkeypatch.setattr(commands, "check_eta", lambda *given: asked.append(given[:5]) or {"met": met})
    result = CliRunner().invoke(commands.eta, ["--model", str(tmp_path), "--length", "4K"])
    assert result.exit_code == (0 if met else 1)
    assert asked == [(tmp_path, 4096, 2048, {"enabled": False}, 512)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "1,two"], "must be whole numbers from 1 to 256"),
        (["--stages", "0"], "must be whole numbers from 1 to 256"),
        (["--stages", "64"], "must be at most 4, the layers of the model"),
        (["--gpu", "h2"], "gpu: h2: must be one of"),
        (["--context", "long"], "must be a whole number such as"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, options: list[str], message: str):
    model = str(config_json(tmp_path, num_hidden_layers=4))
    result = CliRunner().invoke(commands.simulate, [model, "--gpu", "h200", "--context", "4K", *options])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
