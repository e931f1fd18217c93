"""llama.cpp as a peer: what is started, what it says when it ends, how it is stopped. Processes are fakes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.peers import llama_server as module
from cluster.bench.peers.llama_server import llama_server
from cluster.bench.speed.settings import PeerSection
from protos.errors import UserError

MODEL = Path("/m/model.gguf")


class Process:
    """A server that ends with `code` at once, or runs until it is stopped; `stubborn` ones must be killed."""

    def __init__(self, code: int | None = None, says: bytes = b"", stubborn: bool = False) -> None:
        self.code, self.says, self.stubborn = code, says, stubborn
        self.command: list[str] = []
        self.environment: dict[str, str] = {}
        self.stopped: list[str] = []

    def __call__(self, command: list[str], stdout: Any, env: dict[str, str], **more: Any) -> Process:
        self.command, self.environment = command, env
        stdout.write(self.says)
        return self

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.stopped.append("terminate")

    def kill(self) -> None:
        self.stopped.append("kill")

    def wait(self, within_s: float | None = None) -> int:
        if self.stubborn and within_s is not None:
            raise subprocess.TimeoutExpired(self.command, within_s)
        return 0


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(process: Process, version: str = "version: 0.6.0 (1234)\nbuilt with GNU 12\n") -> Process:
        class Done:
            stdout, stderr = "", version

        class Answers:
            def __init__(self, *arguments: Any) -> None:
                pass

            def measure(self, ids: list[int], decode: int) -> dict[str, Any]:
                return {}

        monkeypatch.setattr(module.subprocess, "run", lambda *args, **more: Done)
        monkeypatch.setattr(module.subprocess, "Popen", process)
        monkeypatch.setattr(module, "free_port", lambda: 4711)
        monkeypatch.setattr(module, "OpenAiPeer", Answers)
        return process

    return install


def section(**more: Any) -> PeerSection:
    return PeerSection(kind="llama.cpp", server=Path("/bin/llama-server"), **more)


def open_and_close(model: Path) -> None:
    with llama_server("llama", section(), model, 1, 100):
        pass


def test_the_model_itself_is_served_on_all_threads_and_stopped(start: Any):
    process = start(Process())
    with llama_server("llama", section(arguments=["-fa", "on"]), MODEL, 2, 4161) as server:
        assert (server.url, server.version) == ("http://127.0.0.1:4711/v1", "0.6.0 (1234)")
        assert process.stopped == []
    assert process.command[:7] == ["/bin/llama-server", "-m", str(MODEL), "-c", "4161", "-t", "2"]
    assert process.command[-2:] == ["-fa", "on"]
    assert process.environment["LLAMA_ARG_CACHE_RAM"] == "0"
    assert process.stopped == ["terminate"]


def test_another_file_may_be_named(start: Any):
    process = start(Process(), version="no such option")
    with llama_server("llama", section(gguf=Path("/o.gguf")), Path("/folder"), 1, 100) as server:
        assert server.version == "unknown"
    assert process.command[2] == "/o.gguf"


def test_a_server_that_does_not_stop_is_killed(start: Any):
    process = start(Process(stubborn=True))
    open_and_close(MODEL)
    assert process.stopped == ["terminate", "kill"]


def test_a_server_that_ends_says_why(start: Any):
    start(Process(code=1, says=b"loading\nerror: out of\x1b[0m memory\n"))
    with pytest.raises(UserError, match=r"^peers: llama: /bin/llama-server: exit 1: error: out of.* memory$"):
        open_and_close(MODEL)


def test_what_is_missing_is_named(start: Any, monkeypatch: pytest.MonkeyPatch):
    start(Process())
    with pytest.raises(UserError, match=r"peers: llama.gguf: \(missing\): /folder is no GGUF file: name"):
        open_and_close(Path("/folder"))

    def refuse(*args: Any, **more: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(module.subprocess, "run", refuse)
    with pytest.raises(UserError, match=r"llama.server: /bin/llama-server: cannot be run \(No such file"):
        open_and_close(MODEL)
