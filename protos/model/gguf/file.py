"""Header of a GGUF file, version 2 or 3: settings by key, and where each tensor lies. No data is read.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count and length is compared with the file's
size before it is used.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from protos.model.files import AGAIN, open_regular, shown, what_it_is
from protos.model.json_fields import ModelConfigError

_MAGIC = b"GGUF"
_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_SCALARS = {  # value types by number, as `struct` reads them
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


class BlockType(NamedTuple):
    """How a tensor stores its values: blocks of `elements` neighbouring values of a row in `size` bytes.

    `memory`: bytes of a value in a bfloat16 model on a processor, where codes of 4 bits stay so and others take 8, each
    group of 32 (Q6_K: 16) with a scale and perhaps a zero point of two bytes (workers/quant/gguf/convert.py).
    """

    name: str
    elements: int
    size: int
    memory: float = 2.0


READ = {  # types of tensors that are read, by number
    0: BlockType("F32", 1, 4), 1: BlockType("F16", 1, 2), 30: BlockType("BF16", 1, 2),
    2: BlockType("Q4_0", 32, 18, 0.5625), 3: BlockType("Q4_1", 32, 20, 0.625), 6: BlockType("Q5_0", 32, 22, 1.0625),
    7: BlockType("Q5_1", 32, 24, 1.125), 8: BlockType("Q8_0", 32, 34, 1.0625), 12: BlockType("Q4_K", 256, 144, 0.625),
    13: BlockType("Q5_K", 256, 176, 1.125), 14: BlockType("Q6_K", 256, 210, 1.125),
}  # fmt: skip
_OTHER = {  # known, and refused by name
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class GgufError(ModelConfigError):
    """A GGUF file that is damaged, or holds what is not read."""


class GgufTensor(NamedTuple):
    """One stored tensor. `shape` has the outermost dimension first, as in torch; GGUF writes it last."""

    name: str
    kind: BlockType
    shape: tuple[int, ...]
    start: int  # of its data in the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[-1] // self.kind.elements * self.kind.size

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows."""
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What the header of a file says."""

    path: Path
    settings: Mapping[str, Any]  # numbers, booleans, text, and lists of them
    tensors: Mapping[str, GgufTensor]
    header_bytes: int

    @property
    def architecture(self) -> str:
        """The name of the model's architecture, such as `qwen2`."""
        return str(self.settings.get("general.architecture", ""))

    def error(self, key: str, problem: str) -> GgufError:
        """Return the error of a setting or tensor."""
        return GgufError(f"{self.path}: {shown(key)}: {problem}")


def read_gguf(path: Path) -> GgufFile:
    """Return the header of a file; that of an unchanged file is read once. Raises GgufError."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise GgufError(f"{path}: cannot be read ({error.strerror})") from error
    return _read(Path(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read(path: Path, size: int, _changed: int) -> GgufFile:
    try:
        with open_regular(path) as handle:
            head = handle.read(512)
            if head[:4] != _MAGIC:
                raise GgufError(f"{path}: {what_it_is(head) or f'not a GGUF file: {AGAIN}'}")
            with mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
    except OSError as error:
        raise GgufError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (struct.error, UnicodeDecodeError, OverflowError, RecursionError) as error:
        raise GgufError(f"{path}: damaged ({shown(str(error))}): {AGAIN}") from error


class _Header:
    """Reads a header from the beginning of a mapped file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, len(_MAGIC)

    def read(self) -> GgufFile:
        version = self._number("I")
        if version not in (2, 3):
            words = "its numbers are big-endian" if version >> 16 else "too old or too new"
            raise self._error(f"version {version}: {words}: use a little-endian file of version 2 or 3")
        num_tensors, num_settings = self._count(1), self._count(1)
        settings: dict[str, Any] = {}
        for _ in range(num_settings):
            key = self._text()
            if key in settings:
                raise self._error(f"{shown(key)} is there twice: {AGAIN}")
            settings[key] = self._value(self._number("I"))
        if settings.get("split.count", 1) not in (0, 1):
            raise self._error(
                f"split.count: {settings['split.count']}: a model in several files is not read: join them with "
                "llama-gguf-split --merge, and name the new file"
            )
        found = [self._tensor() for _ in range(num_tensors)]
        alignment = settings.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise self._error(f"general.alignment: {alignment!r}: must be a whole number from 1 to {1 << 20}")
        start = -(-self._at // alignment) * alignment
        tensors = {each.name: each._replace(start=start + each.start) for each in found}
        if len(tensors) < len(found):
            raise self._error(f"two tensors have one name: {AGAIN}")
        whole = max((each.start + each.num_bytes for each in tensors.values()), default=0)
        if whole > len(self._data):
            raise self._error(f"{len(self._data)} of {whole} bytes: its download was not finished: {AGAIN}")
        return GgufFile(self._path, settings, tensors, self._at)

    def _error(self, problem: str) -> GgufError:
        return GgufError(f"{self._path}: {problem}")

    def _number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += struct.calcsize(code)
        return value

    def _count(self, least: int) -> int:
        """Return a count of things with at least that many bytes each."""
        count = int(self._number("Q"))
        if count * least > len(self._data) - self._at:
            raise self._error(f"damaged (a count of {count} at byte {self._at - 8}): {AGAIN}")
        return count

    def _text(self) -> str:
        length = self._count(1)
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._error(f"damaged (a value of type {kind} at byte {self._at}): {AGAIN}")
        return self._number(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind = self._number("I")
        if code := _SCALARS.get(kind):
            count = self._count(struct.calcsize(code))
            values = struct.unpack_from(f"<{count}{code}", self._data, self._at)
            self._at += struct.calcsize(code) * count
            return list(values)
        if kind != _STRING:
            raise self._error(f"damaged (an array of type {kind} at byte {self._at}): {AGAIN}")
        return [self._text() for _ in range(self._count(8))]

    def _tensor(self) -> GgufTensor:
        name = self._text()
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"{shown(name)}: {dimensions} dimensions: must be 1 to {_MAX_DIMENSIONS}: {AGAIN}")
        shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
        number, start = self._number("I"), self._number("Q")
        if (kind := READ.get(number)) is None:
            named = _OTHER.get(number, f"number {number}")
            supported = ", ".join(each.name for each in READ.values())
            raise self._error(f"{shown(name)}: type {named} is not read: use a file with {supported} only")
        if not all(shape) or shape[-1] % kind.elements:
            raise self._error(
                f"{shown(name)}: shape {list(shape)}: rows of {kind.name} are multiples of {kind.elements}"
            )
        return GgufTensor(name, kind, shape, start)
