"""Heads between which documents move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fakes.kv import FakeDisk
from tests.support.rigs.archives import OpenBench
from tests.support.rigs.service import Bench


@pytest.fixture
def open_bench(tmp_path: Path) -> Iterator[OpenBench]:
    """Opens heads that store KV on a disk, or nowhere."""
    made: list[Bench] = []

    def make(disk: FakeDisk | None) -> Bench:
        made.append(Bench(tmp_path / f"head-{len(made)}", disk=disk))
        return made[-1]

    yield make
    for bench in reversed(made):  # each restores what it found
        bench.close()
