"""Other engines on the same checkpoint, prompts and threads: how each is started and asked."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.peers.llama_server import llama_server
from cluster.bench.peers.openai_peer import OpenAiPeer
from cluster.bench.rig import random_ids
from cluster.bench.speed.machine import server_pids
from cluster.bench.speed.settings import PeerSection
from protos.errors import UserError

_TIMEOUT_S = 3600
_ROOT = Path(__file__).resolve().parents[3]
_SCRIPTS = {  # run by a Python that has the package; they print one JSON object
    "transformers": _ROOT / "workers" / "bench" / "transformers_peer.py",
    "vllm": Path(__file__).with_name("vllm_peer.py"),
}
_INSTALL = {"transformers": "pip install 'longreach[test]'", "vllm": "name a Python that has it by `python`"}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A random prompt, which every engine makes of the same numbers, and the tokens decoded after the first one."""

    length: int
    seed: int
    vocab_size: int
    decode: int

    @property
    def ids(self) -> list[int]:
        return random_ids(self.length, self.seed, self.vocab_size)


Engine = Callable[[Prompt], dict[str, Any]]  # gives `first_token_s`, `decode_ms` and what else the engine reports


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine that is ready, and the processes of this machine that are its own."""

    measure: Engine
    pids: tuple[int, ...] = ()


@contextmanager
def opened_peer(name: str, section: PeerSection, model: Path, threads: int, max_len: int) -> Iterator[Peer]:
    """Start a peer, if it is to be started, and stop it at the end.

    Raises:
        UserError: it is not installed, cannot be reached, or does not start.
    """
    with ExitStack() as steps:
        if section.kind == "openai":
            assert section.url is not None, "checked by the settings"
            asked = OpenAiPeer(name, section.url, section.model or "")
            yield Peer(lambda prompt: asked.measure(prompt.ids, prompt.decode), server_pids(section.url))
        elif section.kind == "llama.cpp":
            started = steps.enter_context(llama_server(name, section, model, threads, max_len))
            server = OpenAiPeer(name, started.url, section.model or "")
            yield Peer(lambda prompt: {**server.measure(prompt.ids, prompt.decode), "version": started.version})
        else:
            script = _SCRIPTS[section.kind]
            python = section.python or Path(sys.executable)
            check_installed(name, section.kind, python)

            def run(prompt: Prompt) -> dict[str, Any]:
                command = [python, script, model, prompt.length, prompt.decode, prompt.seed, threads, prompt.vocab_size]
                found = dict(json.loads(run_peer(name, command)[-1]))
                found["decode_ms"] = 1e3 * float(found.pop("decode_s"))
                return found

            yield Peer(run)


def check_installed(name: str, package: str, python: Path) -> None:
    """Raise UserError unless a Python has a package."""
    if python == Path(sys.executable):
        is_there = importlib.util.find_spec(package) is not None
    else:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
        try:
            is_there = not subprocess.run([python, "-c", code], check=False, timeout=60).returncode
        except (OSError, subprocess.TimeoutExpired):
            is_there = False
    if not is_there:
        raise UserError(f"peers: {name}: {package} is not installed in {python}: {_INSTALL[package]}")


def run_peer(name: str, command: Sequence[object]) -> list[str]:
    """Run an engine in a process of its own; returns the lines of its output.

    Raises UserError: it failed, or took more than an hour.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"peers: {name}: no result within {_TIMEOUT_S} s; use shorter --lengths") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"peers: {name}: exit {done.returncode}: {last}")
    if not (lines := done.stdout.strip().splitlines()):
        raise UserError(f"peers: {name}: printed nothing")
    return lines
