"""The process behind `longreach quantize`: its exit status, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protos.model.config_json import load_model_spec
from tests.support.data.checkpoints import make_checkpoint
from workers.quant.__main__ import main


def _request(tmp_path: Path, group: int) -> list[str]:
    source, target = make_checkpoint(tmp_path / "source", "qwen3"), tmp_path / "target"
    target.mkdir()
    request = {
        "source": str(source), "target": str(target), "spec": json.loads(load_model_spec(source).to_json()),
        "bits": 4, "group": group, "kinds": ["attention", "mlp"], "threads": 1,
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    return [str(tmp_path / "request.json"), "--out", str(tmp_path / "result.json")]


def test_a_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_request(tmp_path, 16)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == {"phase": "quantising", "done": result["weights"], "total": result["weights"]}


def test_a_refusal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = _request(tmp_path, 48)
    capsys.readouterr()
    assert main(request) == 2
    assert capsys.readouterr().err.startswith("error: --group: 48: ")
    assert not (tmp_path / "result.json").exists()
