"""The commands write a dated file and say by their exit code whether bounds were kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cluster.bench.planning import commands


@pytest.mark.parametrize("met", [True, False])
def test_plan_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, met: bool):
    asked: list[Any] = []

    def check(*given: Any) -> dict[str, Any]:
        asked.append(given[:5])
        return {"rows": [], "met": met}

    monkeypatch.setattr(commands, "check_plan", check)
    out = tmp_path / "result.json"
    options = ["--model", str(tmp_path), "--length", "8K", "--json", str(out)]
    result = CliRunner().invoke(commands.plan_check, options)
    assert result.exit_code == (0 if met else 1)
    assert asked == [(tmp_path, 8192, 2048, 64, None)]
    assert json.loads(out.read_text())["what"] == "longreach plan against measurement"
