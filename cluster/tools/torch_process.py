"""Run a module that may load torch in a process of its own: a request in, progress meanwhile, a result out."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protos.errors import UserError

OnProgress = Callable[[str, int, int], None]  # phase, done, total


class ProcessFailed(RuntimeError):
    """The process that computes has ended without a result."""


def run_torch(module: str, request: dict[str, Any], on_progress: OnProgress) -> dict[str, Any]:
    """Return what `python -m module` makes of a request; the process is stopped when this one is interrupted.

    Raises:
        UserError: the request cannot be carried out.
        ProcessFailed: the process died.
    """
    with tempfile.TemporaryDirectory(prefix="longreach-torch-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", module, str(asked), "--out", str(answered)]
        with (
            open(Path(folder) / "stderr", "w+b") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    step = json.loads(line)
                    on_progress(step["phase"], step["done"], step["total"])
            except BaseException:
                process.terminate()
                raise
            code = process.wait()
            if code == 0:
                result: dict[str, Any] = json.loads(answered.read_bytes())
                return result
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
    if code == 2 and said[-1].startswith("error: "):
        raise UserError(said[-1].removeprefix("error: "))
    if code == 130:
        raise KeyboardInterrupt
    raise ProcessFailed(f"the computing process ended with status {code}: {said[-1]}")
