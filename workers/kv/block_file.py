"""The file of one block of stored KV: what one shard wrote of `T` consecutive tokens of a prompt.

A safetensors file: for every layer and KV head of its spans (absolute indices, so that any layout can read it) the
tensors `l0.h0.keys` and `.values` `[T, D]`, and for int8 and fp8 `.key_scales` and `.value_scales` `[T]` in float32.
Metadata say what the block is, and have the CRC-32 of every tensor and of themselves (docs/kv-store.md). Nothing in a
file is believed before it was compared with what the reader asks for.

Legend: `T` tokens of the block, `D` head dim.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import math
import mmap
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protos.stage.messages import KvBlock, Span
from workers.kv.direct_file import DirectFile
from workers.kv.open_file import BadBlock, open_file

SCHEMA = "1"
PAGES, STATE = "pages", "state"  # kinds; STATE is reserved for the recurrent state of hybrid models
HEADER_PREFIX = b'{"__metadata__":'
_NAME = re.compile(r"l(\d{1,5})-(\d{1,5})_h(\d{1,5})-(\d{1,5})\.safetensors", re.ASCII)
_CRCS = re.compile(rb'"crc32":"([0-9a-f ]+)"')
_CODES = {"bfloat16": "BF16", "float32": "F32", "int8": "I8", "fp8": "F8_E4M3"}
_WIDTHS = {"BF16": 2, "F32": 4, "I8": 1, "F8_E4M3": 1}
_SCALED = ("int8", "fp8")  # types that have a scale a row
_POPULATE_READ = 22  # MADV_POPULATE_READ: faults pages in, and reports what touching them would end the process for

Arrays = tuple[npt.NDArray[Any], ...]  # of one layer and head: keys, values, and for 8-bit types their scales
_madvise = ctypes.CDLL(None, use_errno=True).madvise if hasattr(mmap, "MADV_NORMAL") else None


class Part(NamedTuple):
    """The layers and KV heads of one file, as absolute indices."""

    layers: Span
    heads: Span

    @property
    def name(self) -> str:
        """The name of the file."""
        return f"l{self.layers.start}-{self.layers.stop}_h{self.heads.start}-{self.heads.stop}.safetensors"

    @classmethod
    def parse(cls, name: str) -> Part | None:
        """Return the part of a file's name; None when it is no such name."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        a, b, c, d = map(int, found.groups())
        part = cls(Span(a, b), Span(c, d))
        return part if a < b and c < d and part.name == name else None

    def cells(self) -> Iterator[tuple[int, int]]:
        """Yield every (layer, head)."""
        return ((layer, head) for layer in range(*self.layers) for head in range(*self.heads))

    @property
    def size(self) -> int:
        """How many pairs of layer and head."""
        return self.layers.size * self.heads.size

    def has(self, layer: int, head: int) -> bool:
        """Return whether it contains a layer and head."""
        return self.layers.start <= layer < self.layers.stop and self.heads.start <= head < self.heads.stop


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What all blocks of a model and cache have in common."""

    dtype: str  # bfloat16, float32, int8, fp8
    head_dim: int
    layers: int  # of the whole model
    kv_heads: int
    max_tokens: int  # of a block

    def sides(self, tokens: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """Return name, type and shape of the tensors of one layer and head."""
        code, rows = _CODES[self.dtype], (tokens, self.head_dim)
        sides: list[tuple[str, str, tuple[int, ...]]] = [("keys", code, rows), ("values", code, rows)]
        scales = [(f"{side}_scales", "F32", (tokens,)) for side in ("key", "value")]
        return [*sides, *scales] if self.dtype in _SCALED else sides

    def contains(self, part: Part) -> bool:
        """Return whether the model has these layers and heads."""
        return part.layers.stop <= self.layers and part.heads.stop <= self.kv_heads

    def max_header(self, part: Part) -> int:
        """Return the most bytes that the header of a file may have."""
        return 4096 + 16 * self.max_tokens + part.size * 4 * 192

    def max_bytes(self, part: Part) -> int:
        """Return the most bytes that a file may have."""
        cell = sum(_WIDTHS[code] * math.prod(shape) for _, code, shape in self.sides(self.max_tokens))
        return 8 + self.max_header(part) + part.size * cell


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What the metadata of a file say, without its checksums."""

    key: bytes
    parent: bytes  # empty: the first block
    start: int
    token_ids: tuple[int, ...]

    @classmethod
    def of(cls, block: KvBlock) -> BlockInfo:
        return cls(block.key, block.parent, block.start, tuple(block.token_ids))


def write_block(
    descriptor: int, shape: BlockShape, part: Part, info: BlockInfo, read: Callable[[int, int], Arrays]
) -> int:
    """Write a block to an empty file; returns its bytes.

    The data come first and the header last, when the checksums are known: its length does not depend on them.

    Args:
        read: returns the arrays of a layer and head, contiguous.

    Raises:
        OSError: the file cannot be written.
    """
    crcs = [0] * (part.size * len(shape.sides(1)))
    file, at = DirectFile(descriptor, len(_header(shape, part, info, crcs))), 0
    # The scales are stored first, so that every tensor begins at a multiple of the size of its elements.
    for layer, head, order in _order(shape, part):
        arrays = read(layer, head)
        for index in order:
            data = arrays[index].reshape(-1).view(np.uint8).data
            crcs[at] = zlib.crc32(data)
            file.append(data)
            at += 1
    return file.finish(_header(shape, part, info, crcs))


def _order(shape: BlockShape, part: Part) -> Iterator[tuple[int, int, Sequence[int]]]:
    """Yield layer, head and which of their arrays come next, in the order of a file."""
    passes = [(2, 3), (0, 1)] if shape.dtype in _SCALED else [(0, 1)]
    return ((layer, head, order) for order in passes for layer, head in part.cells())


def _tensors(shape: BlockShape, part: Part, tokens: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, type and shape of all tensors, in the order of a file."""
    sides = shape.sides(tokens)
    return [
        (f"l{layer}.h{head}.{sides[index][0]}", *sides[index][1:])
        for layer, head, order in _order(shape, part)
        for index in order
    ]


def _header(shape: BlockShape, part: Part, info: BlockInfo, crcs: Sequence[int]) -> bytes:
    """Return the beginning of a file: the length of its header, and the header, with spaces up to a multiple of 8."""
    metadata = {
        "schema": SCHEMA,
        "kind": PAGES,
        "key": info.key.hex(),
        "parent": info.parent.hex(),
        "start": str(info.start),
        "token_ids": _ids_text(info.token_ids),
        "dtype": shape.dtype,
        "head_dim": str(shape.head_dim),
        "layers": f"{part.layers.start}-{part.layers.stop}",
        "kv_heads": f"{part.heads.start}-{part.heads.stop}",
        "crc32": " ".join(f"{crc:08x}" for crc in crcs),
    }
    header: dict[str, object] = {"__metadata__": metadata | {"metadata_crc32": _metadata_crc(metadata)}}
    offset = 0
    for name, code, sizes in _tensors(shape, part, len(info.token_ids)):
        stop = offset + _WIDTHS[code] * math.prod(sizes)
        header[name] = {"dtype": code, "shape": sizes, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@functools.lru_cache(maxsize=16)  # a block may have several files
def _ids_text(token_ids: tuple[int, ...]) -> str:
    return ",".join(map(str, token_ids))


def _metadata_crc(metadata: Mapping[str, str]) -> str:
    """Return the CRC-32 of all values but itself, by sorted name."""
    text = json.dumps(sorted(item for item in metadata.items() if item[0] != "metadata_crc32"))
    return f"{zlib.crc32(text.encode()):08x}"


# --- reading ---------------------------------------------------------------------------------------------------------


class BlockReader:
    """One file, mapped; arrays of `read` are views of the mapping.

    The library would touch mapped pages under the GIL, and a page that the disk cannot read would end the process. So
    the mapping is read here: its header must be, byte by byte, the one that `write_block` writes.
    """

    def __init__(
        self, path: Path, shape: BlockShape, destination: Path | None = None, asked: BlockInfo | None = None
    ) -> None:
        """
        Args:
            destination: what its path will be, if that is another one.
            asked: what it likely is; exactly the header of that block need not be parsed.

        Raises:
            BadBlock: it is not a file of a block of this shape that the name and the folder's name say.
            FileNotFoundError: there is none (any more). OSError: it cannot be read, which says nothing about it.
        """
        named = destination or path
        part = Part.parse(named.name)
        if part is None or not shape.contains(part):
            raise BadBlock(f"{named.name}: not a name of a file of this model")
        descriptor = open_file(path)
        try:
            header = _read_header(descriptor, named.name, shape.max_header(part))
            crcs = _crcs_of(header, shape, part, asked) if asked is not None else None
            if asked is None or crcs is None:
                metadata = _parse_metadata(header, named.name)
                asked = _check_metadata(metadata, shape, part)
                crcs = _parse_crcs(metadata["crc32"], part.size * len(shape.sides(1)), named.name)
                if header != _header(shape, part, asked, crcs):
                    raise BadBlock(f"{named.name}: tensors other than those of its layers and heads")
            self.info = asked
            if (key := asked.key.hex()) != named.parent.name:
                raise BadBlock(f"{named.name}: key {key[:16]}...: not that of its folder")
            self.part, self._shape = part, shape
            self._tensors, size = {}, len(header)
            for crc, (name, code, sizes) in zip(crcs, _tensors(shape, part, len(asked.token_ids)), strict=True):
                self._tensors[name] = (size, code, sizes, crc)
                size += _WIDTHS[code] * math.prod(sizes)
            if os.fstat(descriptor).st_size != size:
                raise BadBlock(f"{named.name}: {os.fstat(descriptor).st_size} bytes: must be {size}")
            self._bytes = np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), np.uint8)
        finally:
            os.close(descriptor)

    def check(self, block: KvBlock) -> None:
        """Raise BadBlock unless it holds exactly this block."""
        asked, found = BlockInfo.of(block), self.info
        for field in ("key", "parent", "start", "token_ids"):
            if getattr(found, field) != getattr(asked, field):
                raise BadBlock(f"{self.part.name}: {field} differs from that of the block asked for")

    def read(self, layer: int, head: int) -> Arrays:
        """Return the arrays of a layer and head; bfloat16 as int16, since numpy has no such type.

        Raises:
            BadBlock: a checksum is wrong, or the disk cannot read them.
        """
        return tuple(self._read(f"l{layer}.h{head}.{side}") for side, *_ in self._shape.sides(1))

    def verify(self) -> None:
        """Read every tensor. Raises BadBlock."""
        for cell in self.part.cells():
            self.read(*cell)

    def _read(self, name: str) -> npt.NDArray[Any]:
        start, code, shape, crc = self._tensors[name]
        data = self._bytes[start : start + _WIDTHS[code] * math.prod(shape)]
        _fault_in(data, self.part.name)
        found = zlib.crc32(data.data)
        if found != crc:
            raise BadBlock(f"{self.part.name}: {name}: checksum {found:08x}: must be {crc:08x}")
        return data.view(_NUMPY[code]).reshape(shape)


_NUMPY: dict[str, Any] = {"BF16": np.int16, "F32": np.float32, "I8": np.int8, "F8_E4M3": np.uint8}


def _fault_in(data: npt.NDArray[np.uint8], name: str) -> None:
    """Read the pages under a mapped array, without the GIL.

    Raises:
        BadBlock: the disk cannot read them, or the file was cut meanwhile. Touching them would be a SIGBUS.
    """
    if _madvise is None:
        return
    first = data.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = data.ctypes.data + data.nbytes - first
    if _madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _POPULATE_READ):
        code = ctypes.get_errno()
        if code != errno.EINVAL:  # older kernels do not know it
            raise BadBlock(f"{name}: cannot be read ({os.strerror(code)})")


def _crcs_of(header: bytes, shape: BlockShape, part: Part, asked: BlockInfo) -> list[int] | None:
    """Return the checksums in a header that is, byte by byte, that of this block; else None."""
    found = _CRCS.search(header)
    crcs = [int(crc, 16) for crc in found[1].split()] if found else []
    return (
        crcs if len(crcs) == part.size * len(shape.sides(1)) and header == _header(shape, part, asked, crcs) else None
    )


def _parse_crcs(text: str, count: int, name: str) -> list[int]:
    try:
        crcs = [int(crc, 16) for crc in text.split(" ")]
    except ValueError as error:
        raise BadBlock(f"{name}: checksums that are no numbers") from error
    if len(crcs) != count:
        raise BadBlock(f"{name}: {len(crcs)} checksums for {count} tensors")
    return crcs


def _read_header(descriptor: int, name: str, limit: int) -> bytes:
    """Return the first bytes of a file up to its data. Raises BadBlock."""
    try:
        size = os.fstat(descriptor).st_size
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if not len(HEADER_PREFIX) < length <= min(limit, size - 8):
            raise BadBlock(f"{name}: a header of {length} bytes in {size} bytes")
        return os.pread(descriptor, 8 + length, 0)
    except OSError as error:
        raise BadBlock(f"{name}: cannot be read ({error.strerror})") from error


def _parse_metadata(header: bytes, name: str) -> dict[str, str]:
    """Return the metadata of a header, which agree with their own checksum. Raises BadBlock."""
    if not header.startswith(HEADER_PREFIX, 8):
        raise BadBlock(f"{name}: no metadata at its beginning")
    try:
        metadata, _ = json.JSONDecoder().raw_decode(header[8:].decode(), len(HEADER_PREFIX))
    except (ValueError, RecursionError) as error:
        raise BadBlock(f"{name}: metadata that cannot be read") from error
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadBlock(f"{name}: metadata that are no texts")
    if metadata.get("metadata_crc32") != _metadata_crc(metadata):
        raise BadBlock(f"{name}: metadata that differ from their checksum")
    return metadata


def read_info(path: Path, shape: BlockShape) -> BlockInfo:
    """Return what metadata say of their block, but for its tokens. Raises BadBlock, FileNotFoundError, OSError."""
    part = Part.parse(path.name)
    if part is None or not shape.contains(part):
        raise BadBlock(f"{path.name}: not a name of a file of this model")
    descriptor = open_file(path)
    try:
        return _info(_parse_metadata(_read_header(descriptor, path.name, shape.max_header(part)), path.name), False)
    finally:
        os.close(descriptor)


def _info(metadata: Mapping[str, str], has_tokens: bool = True) -> BlockInfo:
    """Return what metadata say of their block. Raises BadBlock."""
    schema, kind = metadata.get("schema"), metadata.get("kind")
    if schema != SCHEMA:
        raise BadBlock(f"schema {str(schema)[:20]!r}: this version reads {SCHEMA!r}")
    if kind != PAGES:
        reserved = "reserved for recurrent state, not read by this version" if kind == STATE else f"must be {PAGES!r}"
        raise BadBlock(f"kind {str(kind)[:20]!r}: {reserved}")
    try:
        key, parent = bytes.fromhex(metadata["key"]), bytes.fromhex(metadata["parent"])
        start, ids = int(metadata["start"]), tuple(map(int, metadata["token_ids"].split(","))) if has_tokens else ()
    except (KeyError, ValueError) as error:
        raise BadBlock(f"metadata: {' '.join(str(error).split())[:100]}") from error
    if len(key) != 32 or len(parent) not in (0, 32) or start < 0:
        raise BadBlock("metadata: key, parent or start out of range")
    return BlockInfo(key, parent, start, ids)


def _check_metadata(metadata: Mapping[str, str], shape: BlockShape, part: Part) -> BlockInfo:
    """Return what the metadata of a file of this part say. Raises BadBlock."""
    info = _info(metadata)
    spans = (f"{part.layers.start}-{part.layers.stop}", f"{part.heads.start}-{part.heads.stop}")
    expected = {"dtype": shape.dtype, "head_dim": str(shape.head_dim), "layers": spans[0], "kv_heads": spans[1]}
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise BadBlock(f"{part.name}: {name} {metadata.get(name, '')[:40]!r}: must be {value}")
    if len(info.token_ids) > shape.max_tokens or "crc32" not in metadata:
        raise BadBlock(f"{part.name}: {len(info.token_ids)} tokens: at most {shape.max_tokens}; or no checksums")
    return info
