"""Which compiler builds the kernels: `CXX`, then the usual names, from PATH alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.tools import doctor
from protos.node.compiler import COMPILERS, compiler
from workers.kernels import build


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


def test_the_first_name_counts(folder: Path) -> None:
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
