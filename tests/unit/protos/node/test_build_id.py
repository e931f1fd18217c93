"""The fingerprint of the code is that of what is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from protos.node import build_id as module


def test_it_covers_all_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("protos/node/build_id.py", "workers/kernels/abi.py", "workers/training/loop.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "protos/node/build_id.py"))
    before = module.build_id.__wrapped__()
    assert len(before) == 16
    (tmp_path / "workers/training/loop.py").write_text("2")
    assert module.build_id.__wrapped__() == before
    (tmp_path / "workers/kernels/abi.py").write_text("2")
    assert module.build_id.__wrapped__() != before
