"""A module that runs one request in a process of its own: JSON in, lines of progress meanwhile, JSON out.

Progress goes to standard output, one JSON object per line: `{"phase": text, "done": number, "total": number}`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_MIN_INTERVAL_S = 0.2  # between lines of progress


def run_request(
    module: str, description: str, run: Callable[[dict[str, Any]], dict[str, Any]], argv: Sequence[str] | None
) -> int:  # fmt: skip
    """Run the request of the command line; returns the exit status (2: it cannot be carried out, 130: interrupted)."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("request", type=Path, help="JSON file written by the command line of longreach")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    options = parser.parse_args(argv)
    try:
        result = run(json.loads(options.request.read_bytes()))
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    options.out.write_text(json.dumps(result), encoding="utf-8")
    return 0


class ProgressLines:
    """Prints lines of progress: a few a second, and always the last one of a phase."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Print a line, or none so soon after another."""
        now = time.monotonic()
        if done == total or now - self._last >= _MIN_INTERVAL_S:
            self._last = now
            print(json.dumps({"phase": phase, "done": done, "total": total}), flush=True)
