"""The command line of training on tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.training.ruler.__main__ import main


def test_trains_and_logs(
    assets: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.jsonl"
    options = ["--steps", "1", "--threads", "1", "--assets", str(assets), "--data", str(samples)]
    assert main(["--out", str(tmp_path / "out"), "--json-log", str(log), "--precision", "float32", *options]) == 0
    (record,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (record["step"], record["length"], list(record["tasks"])) == (1, 192, ["niah_multikey_2"])
    assert "after 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--data", "/nonexistent"], "--data: /nonexistent has no"), (["--steps", "0"], "--steps=0: must be at least 1")],
)
def test_wrong_options_are_one_line(
    options: list[str], message: str, assets: Path, samples: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--out", str(tmp_path), "--assets", str(assets), "--data", str(samples), *options]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
