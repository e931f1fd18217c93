"""What result files say about the machine, on a full installation and on a bare checkout."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from pathlib import Path

import pytest

from cluster.tools import doctor
from protos.node import environment as module
from protos.node.environment import (
    COMPILERS,
    build_id,
    compiler,
    cpu_facts,
    environment,
    usable_cores,
    write_result,
)
from workers.kernels import build


def test_an_installation_is_described() -> None:
    facts = environment()
    assert list(facts) == ["date", "version", "build", "python", "torch", "ray", "cpu", "cores"]
    assert facts["build"] == build_id()
    assert facts["torch"] == importlib.metadata.version("torch")
    assert facts["cpu"].endswith(")")
    assert facts["cores"] >= 1


def test_a_bare_checkout_has_no_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    facts = environment()
    assert (facts["version"], facts["torch"], facts["ray"]) == (None, None, None)


def test_a_result_file_has_the_environment_first(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    text = write_result(path, {"what": "a test", "value": 1}, threads=3, date="2030-01-01")
    assert path.read_text() == text + "\n"
    result = json.loads(text)
    assert list(result) == ["environment", "what", "value"]
    assert result["environment"]["threads"] == 3
    assert result["environment"]["date"] == "2030-01-01"
    assert {"commit", "load_average", "cpu", "build"} <= set(result["environment"])
    assert json.loads(write_result(None, {}))["environment"]["date"] != "2030-01-01"


def test_the_commit_tells_a_changed_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(module, "_ROOT", tmp_path)
    assert module.commit_id() is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    clean = module.commit_id()
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert module.commit_id() == clean + "+"


def test_cpu_facts(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    assert cpu_facts(path) is None
    path.write_text("processor\t: 0\nflags\t\t: fpu avx2 amx_tile\nprocessor\t: 1\nflags\t\t: fpu avx2 amx_tile\n")
    assert cpu_facts(path) == {"processor": "1", "flags": "fpu avx2 amx_tile"}
    path.write_text("nothing here")
    assert "flags" not in (cpu_facts(path) or {})


def test_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


def fingerprint(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "_ROOT", root)
    return build_id.__wrapped__()


def test_the_build_follows_names_and_contents_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cluster/a.py", "protos/node/b.py", "workers/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = fingerprint(tmp_path, monkeypatch)
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    (tmp_path / "workers" / "training" / "deep").mkdir(parents=True)  # not in the wheel
    (tmp_path / "workers" / "training" / "deep" / "d.py").write_text("d")
    (tmp_path / "workers" / "training" / "e.py").write_text("e")
    (tmp_path / "cluster" / "notes.txt").write_text("no source")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "x.py").write_text("not installed")
    assert fingerprint(tmp_path, monkeypatch) == first
    (tmp_path / "workers" / "c.py").write_text("other")
    second = fingerprint(tmp_path, monkeypatch)
    (tmp_path / "workers" / "c.py").rename(tmp_path / "workers" / "d.py")
    assert len({first, second, fingerprint(tmp_path, monkeypatch)}) == 3


def test_this_installation_has_a_build() -> None:
    assert build_id() == build_id()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of PATH; CXX is unset."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path


def install(folder: Path, name: str) -> str:
    path = folder / name
    path.touch(0o755)
    return str(path)


def test_the_first_compiler_counts(folder: Path) -> None:
    assert compiler() is None
    for name in ("gcc", "cc", "clang"):  # these do not link C++
        install(folder, name)
    assert compiler() is None
    for name in reversed(COMPILERS):
        path = install(folder, name)
        assert compiler() == path


def test_cxx_goes_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, own = install(folder, "c++"), install(folder, "my-c++")
    for named, found in [("my-c++", own), (own, own), ("absent", path), ("", path)]:
        monkeypatch.setenv("CXX", named)
        assert compiler() == found


def test_build_and_doctor_ask_the_same_function() -> None:
    assert build.compiler is compiler
    assert doctor.compiler is compiler
