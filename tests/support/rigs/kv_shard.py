"""A shard for tests of stored KV: a cache with random content, and a store."""

from __future__ import annotations

from pathlib import Path

import torch

from protos.stage.messages import KvBlock, Span
from workers.kv.block_file import BlockShape, Part
from workers.kv.block_pages import open_pages
from workers.kv.block_store import BlockStore
from workers.kv.paged import PagedKV

LAYERS, HEADS, DIM, PAGES = 5, 4, 17, 131
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
WHOLE = Part(Span(0, LAYERS), Span(0, HEADS))
KEY = bytes(range(32))


class Shard:
    """A cache with random content, and the store of its layers and heads."""

    def __init__(
        self, path: Path, part: Part = WHOLE, dtype: str = "float32", page_size: int = 16, dim: int = DIM, seed: int = 0
    ) -> None:
        self.part, self.page_size = part, page_size
        self.kv = PagedKV(part.layers.size, part.heads.size, dim, PAGES, page_size, DTYPES[dtype])
        generator = torch.Generator().manual_seed(seed)
        for layer in range(part.layers.size):
            for tensor in self.tensors(layer):
                tensor.copy_(torch.randint(-100, 100, tensor.shape, generator=generator))
        self.shape = BlockShape(dtype, dim, LAYERS, HEADS, PAGES * page_size)
        self.store = BlockStore(path, self.shape, part)
        self.pages = open_pages(self.kv, part.layers.size)

    def tensors(self, layer: int) -> list[torch.Tensor]:
        kv = self.kv.layer(layer)
        return [t for t in (kv.keys, kv.values, kv.key_scales, kv.value_scales) if t is not None]

    def content(self, block: KvBlock) -> dict[tuple[int, int, int], torch.Tensor]:
        """The reference: token by token, by absolute layer, absolute head and kind of tensor."""
        slots = [page * self.page_size + at for page in block.pages for at in range(self.page_size)]
        return {
            (self.part.layers.start + layer, self.part.heads.start + head, kind): tensor[head, torch.tensor(slots)]
            for layer in range(self.part.layers.size)
            for kind, tensor in enumerate(self.tensors(layer))
            for head in range(self.part.heads.size)
        }


def block_of(
    page_size: int = 16, tokens: int = 64, first: int = 3, scattered: bool = True, key: bytes = KEY
) -> KvBlock:
    count = tokens // page_size
    pages = [(first + 31 * at) % PAGES for at in range(count)] if scattered else range(first, first + count)
    return KvBlock(key, b"p" * 32, 640, tuple(range(7, 7 + tokens)), tuple(pages))


def parts(layers: int, heads: int) -> list[Part]:
    """A layout: cuts of layers and heads as even as they come."""
    spans = [
        [Span(total * at // count, total * (at + 1) // count) for at in range(count)]
        for total, count in ((LAYERS, layers), (HEADS, heads))
    ]
    return [Part(a, b) for a in spans[0] for b in spans[1]]


def file_of(path: Path, part: Part = WHOLE, key: bytes = KEY) -> Path:
    return path / "v1" / key.hex()[:2] / key.hex() / part.name
