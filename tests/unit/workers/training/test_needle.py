"""The command line of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.training import needle
from workers.training.checkpoint import STATE_FILE

ASSETS = needle.ASSETS


def test_trains_and_logs(assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, log = tmp_path / "out", tmp_path / "log.jsonl"
    options = ["--steps", "2", "--max-length", "64", "--threads", "1", "--assets", str(assets)]
    assert needle.main(["--out", str(out), "--json-log", str(log), *options]) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(record["step"], record["length"]) for record in records] == [(1, 64), (2, 64)]
    screen = capsys.readouterr().out
    assert "first digits" in screen
    assert "after 2 steps" in screen
    assert (out / "model.safetensors").stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps=0: must be at least 1"),
        (["--minutes", "0"], "--minutes=0.0: must be above 0"),
        (["--max-length", "63"], "--max-length=63: must be 64 to 4096"),
        (["--max-length", "4097"], "--max-length=4097: must be 64 to 4096"),
        (["--threads", "0"], "--threads=0: must be 1 to"),
        (["--assets", "/nonexistent"], "--assets: /nonexistent lacks config.json"),
    ],
)
def test_wrong_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert needle.main(["--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"not a state"])
def test_a_bad_state_is_one_line(
    content: bytes | None, assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tmp_path / STATE_FILE
    if content is not None:
        state.write_bytes(content)
    assert needle.main(["--out", str(tmp_path), "--assets", str(assets), "--resume", str(state)]) == 2
    error = capsys.readouterr().err
    assert "--resume" in error
    assert error.count("\n") == 1
