"""Sizes, files and bounds of the measurements of stored KV."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from cluster.bench.kv.rig import (
    ROOM,
    Bounds,
    DemoHead,
    difference,
    disk_rate,
    kv_cache_bytes,
    leave_page_cache,
    stored_bytes,
    stored_files,
)
from cluster.config.deployment import load_deployment


@pytest.mark.parametrize(
    ("layout", "dtype", "expected"),
    [
        ((2, 2), "auto", 2 * 1 * 2 * 64 * 2), ((1, 1), "auto", 4 * 2 * 2 * 64 * 2),
        ((1, 4), "float32", 4 * 1 * 2 * 64 * 4), ((4, 1), "float32", 1 * 2 * 2 * 64 * 4),
    ],
)  # fmt: skip
def test_the_kv_cache_holds_the_tokens(layout: tuple[int, int], dtype: str, expected: int) -> None:
    assert kv_cache_bytes(layout, 10_000_000, dtype) == 10_000_000 * expected
    assert kv_cache_bytes(layout, 1000, dtype) == 256 << 20


@pytest.mark.parametrize("layout", [(2, 2), (1, 4), (1, 1)])
def test_a_head_is_that_of_the_demo_for_the_length(
    tmp_path: Path, layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.bench.kv.rig.free_port", itertools.count(1234).__next__)
    head = DemoHead(tmp_path / "head", layout, 32768, "float32", data=tmp_path / "other")
    deployment = load_deployment(head.config)
    assert deployment.max_model_len == 32768 + ROOM
    assert len(deployment.shards) == layout[0] * layout[1]
    assert deployment.kv_store_path == head.store
    assert json.loads(head.config.read_text())["sparse"]["n_vertical"] == 1000
    off = DemoHead(tmp_path / "off", layout, 32768, is_storing=False)
    assert load_deployment(off.config).kv_store_path is None


def test_every_byte_of_kv_is_counted(tmp_path: Path) -> None:
    folder = tmp_path / "v1" / "ab" / "abcd"
    folder.mkdir(parents=True)
    (tmp_path / "v1" / "id").write_text("name of the store")
    assert stored_bytes(tmp_path) == 0
    (folder / "l0-1_h0-1.safetensors").write_bytes(bytes(1000))
    (folder / ".0123456789abcdef.tmp").write_bytes(bytes(24))
    assert stored_bytes(tmp_path) == 1024
    assert len(list(stored_files(tmp_path))) == 2
    leave_page_cache(tmp_path)
    assert disk_rate(tmp_path) > 0
    assert stored_bytes(tmp_path / "none") == 0


def test_bounds_say_what_is_met() -> None:
    bounds = Bounds()
    bounds.at_most("seconds", 0.5, 1.0)
    bounds.equal("bytes", 0, 0)
    assert bounds.to_json()["met"]
    bounds.at_most("share", 0.050004, 0.05)
    assert bounds.to_json() == {
        "bounds": [
            {"what": "seconds", "value": 0.5, "at_most": 1.0, "met": True},
            {"what": "bytes", "value": 0, "expected": 0, "met": True},
            {"what": "share", "value": 0.05, "at_most": 0.05, "met": False},
        ],
        "met": False,
    }


def test_counts_grow_from_nothing() -> None:
    assert difference({"stored blocks": 5.0, "loaded blocks": 2.0}, {"stored blocks": 3.0}) == {
        "stored blocks": 2.0, "loaded blocks": 2.0,
    }  # fmt: skip
