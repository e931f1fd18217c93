"""A process that computes: its progress, its result, and every way to fail."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from cluster.tools.torch_process import ProcessFailed, run_torch
from protos.errors import UserError

_ANSWER = """
import json, pathlib, sys
request = json.loads(pathlib.Path(sys.argv[1]).read_text())
print(json.dumps({"phase": "adding", "done": 1, "total": 2}), flush=True)
pathlib.Path(sys.argv[3]).write_text(json.dumps({"sum": sum(request["numbers"])}))
"""


def _run_script(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    popen = subprocess.Popen
    monkeypatch.setattr(
        "cluster.tools.torch_process.subprocess.Popen",
        lambda command, **settings: popen([sys.executable, "-c", script, *command[3:]], **settings),
    )


def test_progress_and_result(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    _run_script(monkeypatch, _ANSWER)
    assert run_torch("workers.none", {"numbers": [2, 3]}, lambda *step: seen.append(step)) == {"sum": 5}
    assert seen == [("adding", 1, 2)]


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("import sys; print('error: no such tensor', file=sys.stderr); sys.exit(2)", UserError, "^no such tensor$"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", ProcessFailed, "status -9"),
        ("raise RuntimeError('bad luck')", ProcessFailed, "RuntimeError: bad luck"),
        ("import sys; sys.exit(130)", KeyboardInterrupt, None),
    ],
)
def test_a_process_that_fails(
    monkeypatch: pytest.MonkeyPatch, script: str, error: type[BaseException], message: str | None
) -> None:
    _run_script(monkeypatch, script)
    with pytest.raises(error, match=message):
        run_torch("workers.none", {}, lambda *step: None)
