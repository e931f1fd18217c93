"""The public names: light to import, typed, and with a reference made of their docstrings."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cluster
import longreach
from tests.support.paths import ROOT


@pytest.mark.parametrize("package", ["cluster", "longreach"])
def test_every_exported_name_is_there_and_light(package: str) -> None:
    code = (
        f"import sys, {package} as p; [getattr(p, name) for name in p.__all__]; p.Client()\n"
        "print([m for m in ('ray', 'torch', 'grpc') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip() == "[]"


def test_both_packages_have_the_same_names() -> None:
    assert longreach.__all__ == cluster.__all__ == sorted(cluster.__all__)
    assert longreach.Client is cluster.Client
    assert set(cluster.__all__) <= set(dir(longreach))
    for package in (cluster, longreach):
        with pytest.raises(AttributeError, match="Clients"):
            _ = package.Clients
    scope: dict[str, object] = {}
    exec("from longreach import *", scope)
    assert set(cluster.__all__) <= set(scope)


@pytest.mark.slow
def test_types_of_the_names_in_a_users_program(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"from longreach import {', '.join(cluster.__all__)}\n"
        "answers = Client('127.0.0.1:7777').submit('text', 'Why?', max_tokens=3).answers\n"
        "reveal_type(answers)\n"
    )
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path),
        script,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Revealed type is "list[cluster.client.models.Answer]"' in done.stdout.replace("builtins.", "")


@pytest.mark.slow
def test_reference_of_every_public_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pdoc", "longreach", "-o", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warn" not in done.stderr
    page = (tmp_path / "longreach.html").read_text()
    parts = re.split(r'<(?:section|div) id="([\w.]+)"(?: class="classattr")?>', page)
    entries = dict(zip(parts[1::2], parts[2::2], strict=True))
    methods = {name for name, entry in entries.items() if 'class="attr function"' in entry and name[-1] != "_"}
    assert {"Client.submit", "AsyncJob.stream", "LocalCluster.ask"} <= methods
    assert [name for name in {*cluster.__all__, *methods} if '<div class="docstring">' not in entries[name]] == []
