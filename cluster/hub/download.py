"""Download a model of a hub into its cache, in a process of its own, which an interrupt ends at once.

The libraries of the hubs download with many threads that cannot be told to stop.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.common.text_format import one_line
from cluster.hub.names import HubName, Need, OnProgress

_END_S = 10.0  # for the process to remove what it has not finished


def download(name: HubName, need: Need, on_progress: OnProgress) -> Path:
    """Download what is missing of a model and return its folder or GGUF file.

    Finished files stay in the cache: a download that was interrupted goes on with the others.

    Args:
        on_progress: called several times a second; an exception of it ends the download.

    Raises:
        HubError: the hub does not give the model, or the disk has no room.
    """
    command = [sys.executable, "-m", "cluster.hub", str(name), need]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                said = json.loads(line)
                if "path" in said:
                    return Path(said["path"])
                if "error" in said:
                    raise name.error(said["error"])
                on_progress(said["phase"], said["done"], said["total"])
        finally:
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()
        errors.seek(0)
        last = (errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
    status = f"the downloading process ended with status {process.returncode}"
    raise name.error(f"{status}: {one_line(last, 200)}: start it again")
