"""Download one model in a process of its own: `python -m cluster.hub NAME NEED`. The parent is `cluster.hub.download`.

Prints one JSON object a line: `{"phase", "done", "total"}` in bytes, several times a second, at last `{"path"}` or
`{"error"}`. It ends when its standard input does, with the parent, and leaves no unfinished file that nobody uses.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import cast

import psutil

from cluster.common.units import format_bytes
from cluster.hub.contents import choose_files
from cluster.hub.names import HubError, HubName, Need
from cluster.hub.repository import Repository, open_repository
from protos.model.files import is_gguf

_REPORT_S = 0.25
_EXIT_INTERRUPTED = 130
_UNFINISHED = re.compile(r"\.[0-9a-f]{8}\.incomplete$")  # named by a process: no later download goes on with it


def main(argv: list[str]) -> int:
    """Download; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent ends this process
    signal.signal(signal.SIGTERM, lambda *_: _give_up())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name = HubName.parse(argv[0])
    assert name is not None, argv
    try:
        _say(path=str(download(name, cast(Need, argv[1]), open_repository(name))))
    except HubError as error:
        _say(error=error.problem)
        return 2
    return 0


def download(name: HubName, need: Need, repository: Repository) -> Path:
    """Download what is missing of a model and return its folder or GGUF file. Raises HubError."""
    _say(phase=f"looking up {name.repo}", done=0, total=0)
    sizes = repository.sizes()
    files = choose_files(name, sizes, need)
    left = sum(sizes[file] for file in files if not repository.has(file))
    check_room(name, repository.root, left)
    done = threading.Event()
    reporter = threading.Thread(target=_report, args=(f"downloading {name.repo}", repository.root, left, done))
    reporter.start()
    try:
        folder = repository.fetch(files)
    finally:
        done.set()
        reporter.join()
    return folder / files[0] if is_gguf(Path(files[0])) else folder


def check_room(name: HubName, root: Path, needed: int) -> None:
    """Raise HubError where the disk of a folder has not so many bytes free."""
    folder = root
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        variable = "HF_HUB_CACHE" if name.hub == "huggingface" else "MODELSCOPE_CACHE"
        room = f"{format_bytes(needed)} are to be downloaded into {root}, whose disk has {format_bytes(free)} free"
        raise name.error(f"{room}: make room, or let {variable} name a folder on another disk")


def stored_bytes(root: Path) -> int:
    """Return the bytes of all files below a folder, unfinished ones included, links not."""
    total = 0
    for folder, _, files in os.walk(root):
        for file in files:
            with contextlib.suppress(OSError):  # moved meanwhile
                path = os.path.join(folder, file)
                total += 0 if os.path.islink(path) else os.lstat(path).st_size
    return total


def _report(phase: str, root: Path, total: int, done: threading.Event) -> None:
    before = stored_bytes(root)
    while not done.wait(_REPORT_S):
        _say(phase=phase, done=min(total, max(0, stored_bytes(root) - before)), total=total)


def _say(**values: object) -> None:
    try:
        print(json.dumps(values), flush=True)
    except BrokenPipeError:
        _give_up()


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    _give_up()


def _give_up() -> None:
    """End this process at once, with the files it has not finished."""
    with contextlib.suppress(psutil.Error):
        for file in psutil.Process().open_files():
            if _UNFINISHED.search(file.path):
                with contextlib.suppress(OSError):
                    os.unlink(file.path)
    os._exit(_EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
