"""The benchmark of links: two processes, every kind of link, and no process left."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch

from workers.bench.__main__ import main
from workers.bench.links import KINDS, LinkSetup, measure_links


def test_every_kind_of_link_is_measured() -> None:
    before = set(psutil.Process().children(recursive=True))
    figures = list(measure_links(LinkSetup(64, 32, torch.float32, 3)))
    assert [figure.name.rpartition(", ")[2] for figure in figures] == [*KINDS, "what TLS adds"] * 2
    for figure in figures:
        assert figure.repeats == 3
        assert figure.unit == "ms"
        assert figure.value > 0 or "adds" in figure.name
    left = set(psutil.Process().children(recursive=True)) - before
    assert [process for process in left if "resource_tracker" not in " ".join(process.cmdline())] == []


def test_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    assert main(["--quick", "--json", str(path), "links", "--hidden", "64"]) == 0
    result = json.loads(path.read_text())
    assert result["what"] == "links"
    assert len(result["figures"]) == 10


def test_between_gpus_there_must_be_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: cuda: links between GPUs need two of them"):
        next(measure_links(LinkSetup(64, 32, torch.float32, 3, "cuda")))
