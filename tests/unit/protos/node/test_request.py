"""One request in a process: exit status, the one line of an error, progress."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protos.node.request import ProgressLines, run_request


def _run(tmp_path: Path, run: Any) -> tuple[int, Path]:
    (tmp_path / "request.json").write_text('{"number": 2}')
    out = tmp_path / "result.json"
    return run_request("module", "Double.", run, [str(tmp_path / "request.json"), "--out", str(out)]), out


def test_a_result(tmp_path: Path) -> None:
    code, out = _run(tmp_path, lambda request: {"double": 2 * request["number"]})
    assert (code, json.loads(out.read_text())) == (0, {"double": 4})


@pytest.mark.parametrize(
    ("error", "code"), [(ValueError("bad\nnumber"), 2), (OSError("gone"), 2), (KeyboardInterrupt(), 130)]
)
def test_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int) -> None:
    def fail(request: dict[str, Any]) -> dict[str, Any]:
        raise error

    status, out = _run(tmp_path, fail)
    assert status == code
    assert not out.exists()
    assert capsys.readouterr().err == ("" if code == 130 else f"error: {' '.join(str(error).split())}\n")


def test_progress_has_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines()
    for done in range(1, 101):
        lines("adding", done, 100)
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert seen[-1] == {"phase": "adding", "done": 100, "total": 100}
    assert len(seen) < 100
