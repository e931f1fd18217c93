"""Generate the blocking client from the one for asyncio: `python -m cluster.client.generate [--check]`.

`client.py` is `async_client.py` without `async` and `await` and with other names, and so are the other files of
`SOURCES`. With `--check` nothing is written and the exit code is 1 when one is stale. Needs ruff, which comes with the
`test` extra.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

_FOLDER = Path(__file__).parent
SOURCES = [_FOLDER / name for name in ("async_client.py", "async_jobs.py", "documents/async_documents.py")]
# pattern and replacement, in this order
_RULES = [
    (r"# sync: (@property)", r"\1"),
    (r"await asyncio\.to_thread\((\w+), ", r"\1("),
    (r"\(await ([^\n]+?)\)\.", r"\1."),  # (await job.wait()).done
    (r"\.result\(\)", ".result"),
    (r"\b(?:async|await) ", ""),
    (r"\basyncio\.sleep\b", "time.sleep"),
    (r"\baclose\b", "close"),
    (r"__a(enter|exit)__", r"__\1__"),
    (r", is_async=True", ""),
    (r"\b(_?)Async(?=[A-Z])", r"\1"),
    (r"\basync_(?=(client|jobs|documents)\b)", ""),
    (r" for asyncio", ""),
    (r"and belongs to its event loop", "and may be used from several threads"),
]


def target_of(source: Path) -> Path:
    """Return the file of the blocking client."""
    return source.with_name(source.name.removeprefix("async_"))


def header_of(source: Path) -> str:
    """Return the first line of what is generated from a file."""
    return f"# Generated from {source.name} by python -m cluster.client.generate. DO NOT EDIT.\n"


def generate(source: Path) -> str:
    """Return the code of the blocking client for a file of the other one."""
    return header_of(source) + convert(source.read_text(), target_of(source))


def convert(code: str, target: Path) -> str:
    """Return code without asyncio, as ruff formats it at the place of `target`."""
    needs_time = "asyncio.sleep" in code and "import time\n" not in code
    code = code.replace("import asyncio\n", "import time\n" if needs_time else "")
    for pattern, replacement in _RULES:
        code = re.sub(pattern, replacement, code)
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--select", "I,UP028", "--fix", "--unsafe-fixes", "--quiet"], ["format", "--quiet"]):
        arguments = [*ruff, *command, "--stdin-filename", str(target), "-"]
        code = subprocess.run(arguments, input=code, capture_output=True, text=True, check=True).stdout
    return code


def main(arguments: list[str]) -> int:
    """Write the files, or compare them with `--check`; return the exit code."""
    fresh = {target_of(source): generate(source) for source in SOURCES}
    if arguments == ["--check"]:
        return int(any(not target.exists() or code != target.read_text() for target, code in fresh.items()))
    for target, code in fresh.items():
        target.write_text(code)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
