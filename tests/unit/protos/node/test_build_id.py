"""The fingerprint of the installed code: it changes with any name or content, and is the same everywhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.node import build_id as module


def fingerprint(root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "__file__", str(root / "protos" / "node" / "build_id.py"))
    return module.build_id.__wrapped__()


def test_it_follows_names_and_contents_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cluster/a.py", "protos/node/b.py", "workers/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    first = fingerprint(tmp_path, monkeypatch)
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    (tmp_path / "cluster" / "notes.txt").write_text("no source")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "x.py").write_text("not installed")
    assert fingerprint(tmp_path, monkeypatch) == first
    (tmp_path / "workers" / "c.py").write_text("other")
    second = fingerprint(tmp_path, monkeypatch)
    (tmp_path / "workers" / "c.py").rename(tmp_path / "workers" / "d.py")
    assert len({first, second, fingerprint(tmp_path, monkeypatch)}) == 3


def test_this_installation_has_one() -> None:
    assert module.build_id() == module.build_id()
