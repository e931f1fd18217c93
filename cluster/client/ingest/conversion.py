"""Text of a file of a format, taken out by a child process with limits of memory and time; see `worker`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cluster.common.text_format import one_line
from protos.errors import InvalidRequest

_ROOT = Path(__file__).parents[3]
_PROGRAM = (
    "import sys; sys.path[:] = sys.argv[4:]\n"
    "from cluster.client.ingest.worker import main\n"
    "main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)
_THREADS = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # each would take address space


@dataclass(frozen=True, slots=True)
class ConversionLimits:
    """What taking the text out of one file may cost."""

    seconds: float = 300.0
    memory_bytes: int = 4 << 30


def convert(kind: str, file: BinaryIO, limits: ConversionLimits = ConversionLimits()) -> tuple[bytes, tuple[str, ...]]:
    """Return the text of a file as UTF-8, and notes about it.

    Args:
        kind: as of `worker.extract`.
        file: a real file, at its beginning.

    Raises:
        InvalidRequest: it has no text, is damaged, encrypted, too large, or exceeds a limit.
    """
    # the modules that we can import, and no start-up file of the place that we are in
    paths = dict.fromkeys([str(_ROOT), *(os.path.abspath(path) for path in sys.path if path)])
    numbers = [str(limits.memory_bytes), str(int(limits.seconds) + 2)]
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, kind, *numbers, *paths]
    file.seek(0)
    try:
        done = subprocess.run(
            command, stdin=file.fileno(), capture_output=True, timeout=limits.seconds, cwd="/", check=False,
            env=os.environ | _THREADS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest(f"takes more than {limits.seconds:g} s to read") from error
    header, _, content = done.stdout.partition(b"\n")
    if done.returncode or not header:
        raise InvalidRequest(_describe_end(done.returncode, done.stderr))
    report = json.loads(header)
    if "error" in report:
        raise InvalidRequest(report["error"])
    return content, tuple(report["notes"])


def _describe_end(code: int, errors: bytes) -> str:
    """Return why a child wrote no report: a limit, or its last words."""
    if code < 0:
        name = signal.Signals(-code).name
        return "takes too much processor time" if name == "SIGXCPU" else f"cannot be read: its reader ended ({name})"
    lines = errors.decode(errors="replace").strip().splitlines()
    return f"cannot be read: its reader ended ({one_line(lines[-1], 200) if lines else f'code {code}'})"
