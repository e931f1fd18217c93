"""llama.cpp as a second reference: its server over a GGUF file, where one is installed.

It is taken from `LONGREACH_LLAMA_SERVER` or from PATH. Products there round what they multiply to 8 bits (Q8_0, Q8_1,
Q8_K), whatever the settings; KV and all else are float32 here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.faults.rig import free_port

VARIABLE = "LONGREACH_LLAMA_SERVER"
_TOP = 8  # tokens whose log-probabilities are asked for
_WITHIN_S = 300.0


def installed() -> str | None:
    """Return the path of llama-server, None where there is none."""
    return shutil.which(os.environ.get(VARIABLE, "llama-server"))


@dataclass(frozen=True, slots=True)
class Continuation:
    """Greedy tokens without the one that ended them, and the log-probabilities of the best tokens at each."""

    tokens: list[int]
    best: list[dict[int, float]]


class LlamaServer:
    """A running server."""

    def __init__(self, url: str) -> None:
        self._url = url

    def tokenize(self, text: str) -> list[int]:
        """Return ids; what spells a control token is one."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return list(self._post("/tokenize", body)["tokens"])

    def chat_prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return a conversation under the template of the file."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def greedy(self, prompt: Sequence[int], count: int) -> Continuation:
        """Continue a prompt until the model ends its answer, `count` tokens at most."""
        answer = self._post(
            "/completion",
            {"prompt": list(prompt), "n_predict": count, "temperature": 0.0, "top_k": 1, "n_probs": _TOP,
             "cache_prompt": False, "samplers": ["top_k"]},
        )  # fmt: skip
        steps = answer["completion_probabilities"]
        best = [{top["id"]: float(top["logprob"]) for top in step["top_logprobs"]} for step in steps]
        return Continuation([step["id"] for step in steps], best)

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/health", timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_WITHIN_S) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"llama-server: {path}: {error.code}: {error.read()[:300]!r}") from error


@contextmanager
def llama_server(program: str, gguf: Path, folder: Path, context: int = 1024) -> Iterator[LlamaServer]:
    """Start a server over a file, on one thread a core that this process has; its output goes to `folder`."""
    port = free_port()
    command = [
        program, "-m", gguf, "-c", context, "-np", 1, "-t", len(os.sched_getaffinity(0)), "--host", "127.0.0.1",
        "--port", port, "-fa", "off", "-ctk", "f32", "-ctv", "f32", "--jinja", "--no-warmup",
    ]  # fmt: skip
    log = folder / "llama-server.log"
    with log.open("wb") as out:
        process = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    server = LlamaServer(f"http://127.0.0.1:{port}")
    try:
        deadline = time.monotonic() + _WITHIN_S
        while not server.is_ready():
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, "llama-server does not answer"
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        process.wait(60)
