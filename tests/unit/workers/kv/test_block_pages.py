"""Pages of a cache as arrays, in host memory and as on a device."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.rigs.kv_shard import DTYPES, LAYERS, Shard, block_of
from workers.kv.block_pages import BlockPages, DevicePages


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scattered", [True, False])
def test_pages_of_a_device_are_copied_as_those_of_the_host(tmp_path: Path, dtype: str, scattered: bool):
    shard, block = Shard(tmp_path, dtype=dtype), block_of(scattered=scattered)
    device = DevicePages(shard.kv, LAYERS)
    expected = shard.content(block)
    assert shard.store.store(block, device).blocks == 1
    other = replace(block, pages=block_of(first=12, scattered=not scattered).pages)
    assert shard.store.load(other, device).blocks == 1
    assert all(torch.equal(tensor, expected[at]) for at, tensor in shard.content(other).items())


def test_the_cache_of_the_host_is_not_copied(tmp_path: Path):
    shard = Shard(tmp_path)
    assert type(shard.pages) is BlockPages
    (keys, _) = shard.pages.read(1, 2, slice(16, 32))
    assert keys.ctypes.data == shard.kv.layer(1).keys[2, 16:].data_ptr()


def test_copies_of_a_gpu_go_through_its_own_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The device is that of the thread before the stream is, so that going back touches no other GPU."""
    pages, entered = DevicePages(Shard(tmp_path).kv, LAYERS), []

    def entering(what: str) -> object:
        def context(value: object) -> contextlib.AbstractContextManager[object]:
            entered.append((what, value))
            return contextlib.nullcontext()

        return context

    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, entering(name))
    pages._stream = "a stream"  # type: ignore[assignment]
    pages.read(0, 0, slice(0, 16))
    assert entered == [("device", torch.device("cpu")), ("stream", "a stream")]
