"""How fast one process writes and reads files of stored KV, beside plain files of the same bytes on the same disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from protos.stage.messages import KvBlock, Span
from workers.bench.model import benchmark_spec
from workers.bench.timing import Figure, median_figure
from workers.kv.block_file import BlockShape, Part
from workers.kv.block_pages import BlockPages, open_pages
from workers.kv.block_store import BlockStore, Outcome
from workers.kv.paged import PagedKV

TOKENS = 512  # of a block
_PAGE = 64
_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def measure_kv_files(folder: Path | None, num_blocks: int, dtype: torch.dtype, repeats: int) -> Iterator[Figure]:
    """Yield MB/s of writing blocks, and of reading them from the disk and from the page cache; plain files likewise.

    One thread, as that of a shard that writes: a block of the benchmark model is 4 MiB in bfloat16. What is read is
    copied to pages, and its checksums are compared. Writes end in the page cache. Reads from the disk come after
    POSIX_FADV_DONTNEED; what a hypervisor or a disk has in caches of its own is beyond reach.

    Args:
        folder: on the disk to measure; default: that of temporary files.

    Raises:
        ValueError: a block was not written or read.
    """
    spec = benchmark_spec()
    layers, heads = spec.num_hidden_layers, spec.num_key_value_heads
    shape = BlockShape(_NAMES[dtype], spec.head_dim, layers, heads, TOKENS)
    kv = PagedKV(layers, heads, spec.head_dim, num_blocks * TOKENS // _PAGE, _PAGE, dtype)
    for layer in range(layers):
        for tensor in (kv.layer(layer).keys, kv.layer(layer).values):
            tensor.normal_()
    pages, rates = open_pages(kv, layers), dict[str, list[float]]()
    with tempfile.TemporaryDirectory(prefix="lr-kv-", dir=folder) as name:
        store = BlockStore(Path(name) / "blocks", shape, Part(Span(0, layers), Span(0, heads)))
        for _ in range(repeats):
            for what, rate in _round(store, pages, list(_blocks(num_blocks)), Path(name)):
                rates.setdefault(what, []).append(rate)
    for what, values in rates.items():
        yield median_figure(what, values, "MB/s", f"{num_blocks} files")


def _round(
    store: BlockStore, pages: BlockPages, blocks: Sequence[KvBlock], folder: Path
) -> Iterator[tuple[str, float]]:
    """Yield what was done, and how many MB/s that took; every file is written anew."""

    def load() -> None:
        for block in blocks:
            _check(store.load(block, pages))

    def write() -> None:
        for block in blocks:
            _check(store.store(block, pages))

    def write_plainly() -> None:
        for path, content in zip(plain, contents, strict=True):
            path.write_bytes(content)

    store.drop(block.key for block in blocks)
    began = time.perf_counter()
    write()
    seconds = time.perf_counter() - began
    files = [path for block in blocks for path in store.files(block.key)]
    size = sum(path.stat().st_size for path in files)
    yield "blocks, written", size / 1e6 / seconds
    leave_page_cache(files)
    yield "blocks, read from the disk", _rate(size, load)
    yield "blocks, read from memory", _rate(size, load)
    contents = [path.read_bytes() for path in files]
    plain = [folder / f"plain {number}" for number in range(len(files))]
    for path in plain:
        path.unlink(missing_ok=True)
    yield "plain files, written", _rate(size, write_plainly)
    yield "the same, then to the disk", _rate(size, lambda: leave_page_cache(plain))
    yield "plain files, read from the disk", _rate(size, lambda: read_plainly(plain))
    yield "plain files, read from memory", _rate(size, lambda: read_plainly(plain))


def _rate(size: int, call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return size / 1e6 / (time.perf_counter() - began)


def _check(outcome: Outcome) -> None:
    if outcome.problem:
        raise ValueError(f"kv-files: {outcome.problem}")


def _blocks(count: int) -> Iterator[KvBlock]:
    parent = b""
    for number in range(count):
        key = hashlib.sha256(parent + b"block").digest()
        pages = range(number * TOKENS // _PAGE, (number + 1) * TOKENS // _PAGE)
        yield KvBlock(key, parent, number * TOKENS, [7] * TOKENS, list(pages))
        parent = key


def leave_page_cache(files: Sequence[Path]) -> None:
    """Have files written to the disk and leave the page cache of this system."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_plainly(files: Sequence[Path]) -> None:
    """Read files one after the other."""
    buffer = bytearray(1 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
