"""llama.cpp as a peer: its server over a GGUF file, started on a free port and stopped at the end."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.faults.rig import free_port
from cluster.bench.head_process import until
from cluster.bench.peers.openai_peer import OpenAiPeer
from cluster.bench.speed.settings import PeerSection
from cluster.common.text_format import one_line
from protos.errors import UserError
from protos.model.files import is_gguf

_LOAD_WITHIN_S = 600.0
_STOP_WITHIN_S = 30.0
# no copies of earlier prompts between runs; a version that does not know the variable does not read it
_ENVIRONMENT = {"LLAMA_ARG_CACHE_RAM": "0"}


@dataclass(frozen=True, slots=True)
class LlamaServer:
    """A server that answers: its URL, and what it says of its build."""

    url: str
    version: str


@contextmanager
def llama_server(name: str, section: PeerSection, model: Path, threads: int, max_len: int) -> Iterator[LlamaServer]:
    """Start llama-server over a GGUF file and stop it at the end.

    Args:
        model: is the file, unless the settings name another one.
        max_len: tokens of the longest context, with the answer.

    Raises:
        UserError: there is no file, or the program cannot be run or ends; its last line is in the message.
    """
    assert section.server is not None, "checked by the settings"
    gguf = section.gguf or model
    if not is_gguf(gguf):
        raise UserError(f"peers: {name}.gguf: (missing): {gguf} is no GGUF file: name the same checkpoint as GGUF")
    version = _version(name, section.server)
    port = free_port()
    command = [
        section.server, "-m", gguf, "-c", max_len, "-t", threads, "-np", 1, "--host", "127.0.0.1", "--port", port,
        *section.arguments,
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}/v1"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            env=os.environ | _ENVIRONMENT,
        )  # fmt: skip

        def is_ready() -> bool:
            if (code := process.poll()) is not None:
                log.seek(0)
                raise UserError(f"peers: {name}: {section.server}: exit {code}: {_last_line(log.read())}")
            try:
                OpenAiPeer(name, url, "").measure([1, 2, 3], 1)
            except UserError:
                return False
            return True

        try:
            until(is_ready, f"{name} answers", _LOAD_WITHIN_S)
            yield LlamaServer(url, version)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _version(name: str, server: Path) -> str:
    """Return what the program says of its version. Raises UserError: it cannot be run."""
    try:
        done = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "no answer within 60 s"
        raise UserError(f"peers: {name}.server: {server}: cannot be run ({reason})") from error
    found = re.search(r"version:? *(.+)", done.stdout + done.stderr)
    return one_line(found[1], 100) if found else "unknown"


def _last_line(log: bytes) -> str:
    lines = log.decode(errors="replace").strip().splitlines()
    return one_line(lines[-1], 200) if lines else "no message"
