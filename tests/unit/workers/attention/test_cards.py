"""The table of cards: what it names, what it does not, and that attention follows it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from workers.attention import cards, flash

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
TABLE = {"A card": {"128": {"dense": "flash", "tile_tflops": {"128": 480.5, "64": 390}}, "64": {"dense": "future"}}}


@pytest.fixture
def _a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    path = tmp_path / "cards.json"
    path.write_text(json.dumps(TABLE))
    monkeypatch.setattr(cards, "TABLE", path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    for cached in (cards._table, cards._name):
        cached.cache_clear()
    yield
    for cached in (cards._table, cards._name):
        cached.cache_clear()


@pytest.mark.usefixtures("_a_card")
def test_what_the_table_names() -> None:
    assert cards.dense_library(GPU, 128) == cards.FLASH
    assert cards.tile_rates(GPU, 128) == {128: 480.5, 64: 390.0}
    assert cards.dense_library(GPU, 64) is None, "a name that this build does not know"
    assert cards.tile_rates(GPU, 64) == {}
    assert cards.dense_library(GPU, 80) is None
    assert cards.dense_library(CPU, 128) is None


def test_the_committed_table_can_be_read() -> None:
    for dims in json.loads(cards.TABLE.read_text()).values():
        for dim, entry in dims.items():
            assert dim.isdigit()
            assert entry["dense"] in cards.LIBRARIES


def test_benchmarks_name_a_library() -> None:
    with cards.using(cards.OWN), cards.using(cards.CUDNN):
        assert cards.dense_library(CPU, 128) == cards.CUDNN
    assert cards.dense_library(CPU, 128) is None
    with pytest.raises(ValueError, match="must be one of own, cudnn"), cards.using("best"):
        pass


@pytest.mark.parametrize(("library", "flash_attn", "fast"), [
    (cards.OWN, False, False), (cards.CUDNN, False, True), (cards.FLASH, False, True), (cards.FLASH_ATTN, True, True),
])  # fmt: skip
def test_attention_follows_it(library: str, flash_attn: bool, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flash, "_flash_attn_func", lambda: print)
    monkeypatch.setattr(flash, "_cudnn_works", lambda *_: True)
    with cards.using(library):
        assert flash.supports_flash_attn(GPU, torch.bfloat16, 128) is flash_attn
        assert flash.has_fast_kernel(GPU, torch.bfloat16, 128) is fast
