"""Generate the blocking client from the one for asyncio: `python -m cluster.client.generate [--check]`.

`client.py` is `async_client.py` without `async` and `await` and with other names. With `--check` nothing is written
and the exit code is 1 when the file is stale. Needs ruff, which comes with the `test` extra.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("async_client.py")
TARGET = Path(__file__).with_name("client.py")
HEADER = f"# Generated from {SOURCE.name} by python -m cluster.client.generate. DO NOT EDIT.\n"
# pattern and replacement, in this order
_RULES = [
    (r"# sync: (@property)", r"\1"),
    (r"\(await ([^\n]+?)\)\.", r"\1."),  # (await job.wait()).done
    (r"\.result\(\)", ".result"),
    (r"\b(?:async|await) ", ""),
    (r"import asyncio\n", ""),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"\baclose\b", "close"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r", is_async=True", ""),
    (r"\b(_?)Async(?=[A-Z])", r"\1"),
    (r" for asyncio", ""),
    (r"and belongs to its event loop", "and may be used from several threads"),
]


def generate(source: str) -> str:
    """Return the code of the blocking client."""
    for pattern, replacement in _RULES:
        source = re.sub(pattern, replacement, source)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--select", "I,UP028", "--fix", "--unsafe-fixes", "--quiet"], ["format", "--quiet"]):
        arguments = [*ruff, *command, "--stdin-filename", str(TARGET), "-"]
        source = subprocess.run(arguments, input=source, capture_output=True, text=True, check=True).stdout
    return HEADER + source


def main(arguments: list[str]) -> int:
    """Write the file, or compare it with `--check`; return the exit code."""
    code = generate(SOURCE.read_text())
    if arguments == ["--check"]:
        return int(code != TARGET.read_text())
    TARGET.write_text(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
