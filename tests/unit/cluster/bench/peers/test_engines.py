"""Peers that are processes: what is run, and the line that says why it failed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.bench.peers import engines as peers
from cluster.bench.peers.engines import Prompt, check_installed, opened_peer, run_peer
from cluster.bench.speed.settings import PeerSection
from protos.errors import UserError

PROMPT = Prompt(length=100, seed=7, vocab_size=500, decode=3)


def test_the_prompt_is_the_same_for_all():
    assert PROMPT.ids == Prompt(100, 7, 500, 64).ids
    assert len(PROMPT.ids) == 100
    assert 5 <= min(PROMPT.ids) <= max(PROMPT.ids) < 500
    assert PROMPT.ids != Prompt(100, 8, 500, 3).ids


@pytest.mark.parametrize("kind", ["transformers", "vllm"])
def test_a_python_package_runs_in_a_process(kind: Any, monkeypatch: pytest.MonkeyPatch):
    commands = []

    def run(name: str, command: list[object]) -> list[str]:
        commands.append(list(map(str, command)))
        return ["noise", '{"version": "1", "first_token_s": 2.0, "decode_s": 0.25}']

    monkeypatch.setattr(peers, "run_peer", run)
    monkeypatch.setattr(peers, "check_installed", lambda *args: None)
    with opened_peer("x", PeerSection(kind=kind, python=Path("/py")), Path("/model"), 2, 200) as peer:
        assert peer.measure(PROMPT) == {"version": "1", "first_token_s": 2.0, "decode_ms": 250.0}
        assert peer.pids == ()
    python, script, *rest = commands[0]
    assert python == "/py"
    assert Path(script).name == f"{kind}_peer.py"
    assert Path(script).is_file()
    assert rest == ["/model", "100", "3", "7", "2", "500"]


def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"peers: x: vllm is not installed in .*: name a Python"):
        check_installed("x", "vllm", tmp_path / "python")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"transformers is not installed in .*: pip install"):
        check_installed("x", "transformers", Path(sys.executable))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit('it broke')", "peers: x: exit 1: it broke"),
        ("raise SystemExit(3)", "peers: x: exit 3: no message"),
        ("pass", "peers: x: printed nothing"),
    ],
)
def test_a_process_that_fails_says_why(code: str, expected: str, monkeypatch: pytest.MonkeyPatch):
    class Done:
        returncode = {"pass": 0, "raise SystemExit(3)": 3}.get(code, 1)
        stdout, stderr = "", "Traceback\nit broke\n" if "broke" in code else ""

    monkeypatch.setattr(peers.subprocess, "run", lambda *args, **more: Done)
    with pytest.raises(UserError, match=f"^{expected}$"):
        run_peer("x", [sys.executable])
