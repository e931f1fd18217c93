"""Quantised matrices out of safetensors and GGUF files, and random ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from protos.model.checkpoint import Checkpoint, CheckpointError, expected_tensors
from protos.model.quant.scheme import QuantScheme
from protos.model.spec import ModelSpec
from protos.model.tensor_names import LM_HEAD
from protos.stage.messages import Span
from workers.model.quantized import MatrixSource, Region
from workers.quant.gguf.blocks import KINDS
from workers.quant.gguf.source import GgufSource
from workers.quant.packed import has_whole_tiles
from workers.quant.registry import read_matrix
from workers.quant.stored import group_size
from workers.quant.weight import MIN_GROUP, Kind, QuantizedWeight

_DUMMY_ROWS = 64  # rows of a random matrix that are generated together
# what codes of a kind are multiplied by for a standard deviation of 0.02
_DUMMY_SCALES: dict[Kind, float] = {"int4": 0.02 / 4.61, "int8": 0.02 / 73.9, "float8_e4m3": 0.02}


def _matrices(spec: ModelSpec, with_head: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the matrices that checkpoints store quantised."""
    tensors = expected_tensors(spec).items()
    return {name: shape for name, shape in tensors if name.endswith("_proj.weight") or (with_head and name == LM_HEAD)}


class FileMatrices(MatrixSource):
    """The quantised matrices of a checkpoint; files are opened by `opened` and stay mapped."""

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, scheme: QuantScheme, opened: Callable[[str], Any]):
        self._checkpoint, self._scheme, self._opened = checkpoint, scheme, opened
        self._shapes = _matrices(spec, with_head=True)

    def has(self, name: str) -> bool:
        """Return whether the matrix of this canonical name is quantised."""
        return name in self._shapes and self._checkpoint.is_quantized(name)

    def read(self, name: str, rows: Span, columns: Span) -> QuantizedWeight:
        """Return a region of a matrix. Raises as the readers do."""
        stored = _StoredParts(self._checkpoint, self._opened, name.removesuffix("weight"), *self._shapes[name])
        return read_matrix(stored, self._scheme, rows, columns)


@dataclass(frozen=True, slots=True)
class _StoredParts:
    """A `StoredMatrix` of safetensors files."""

    checkpoint: Checkpoint
    opened: Callable[[str], Any]
    prefix: str  # the module's name and a dot
    rows: int
    columns: int

    def has(self, part: str) -> bool:
        return self.prefix + part in self.checkpoint.tensors

    def read(self, part: str, *region: slice) -> torch.Tensor:
        stored = self.checkpoint.tensors[self.prefix + part]
        file = self.opened(stored.file)
        return file.get_slice(stored.name)[region] if region else file.get_tensor(stored.name)

    def error(self, part: str, problem: str) -> Exception:
        stored = self.checkpoint.tensors[self.prefix + part]
        return CheckpointError(f"{self.checkpoint.model_dir / stored.file}: {stored.name}: {problem}")


class GgufMatrices(MatrixSource):
    """The matrices of a GGUF file in blocks of codes."""

    def __init__(self, checkpoint: Checkpoint, source: GgufSource) -> None:
        self._checkpoint, self._source = checkpoint, source

    def has(self, name: str) -> bool:
        """Return whether the matrix of this canonical name consists of blocks of codes."""
        return self._checkpoint.tensors[name].dtype in KINDS

    def keeps(self, regions: Sequence[Region], shape: Sequence[int], pairs: bool) -> bool:
        """Return whether a weight can be packed as it is; else it is unpacked: any shard can be."""
        kinds = {self._checkpoint.tensors[region.name].dtype for region in regions}
        cut = any(region.columns.start % MIN_GROUP or region.columns.stop % MIN_GROUP for region in regions)
        rows = [shape] if len(shape) == 3 else [(region.rows.size, shape[-1]) for region in regions]
        if cut or not all(has_whole_tiles(each, pairs) for each in rows):
            return False
        return bool(kinds & KINDS.keys()) and (len(shape) == 2 or len(kinds) == 1)

    def read(self, name: str, rows: Span, columns: Span) -> QuantizedWeight:
        """Return a region of a matrix; scales and zero points are rounded to float16."""
        stored = self._checkpoint.tensors[name]
        return self._source.quantized(name, stored, range(*rows)).columns(*columns)


class RandomMatrices(MatrixSource):
    """Random matrices of a scheme, made in blocks of rows with seeds of their own: equal for every layout."""

    def __init__(self, spec: ModelSpec, scheme: QuantScheme, seed: int) -> None:
        self._scheme, self._seed = scheme, seed
        self._kind: Kind = "float8_e4m3" if scheme.is_float else "int4" if scheme.bits == 4 else "int8"
        self._shapes = _matrices(spec, scheme.head)

    def has(self, name: str) -> bool:
        """Return whether the matrix of this canonical name is quantised: all of attention, MLPs and experts are."""
        return name in self._shapes

    def read(self, name: str, rows: Span, columns: Span) -> QuantizedWeight:
        """Return a region of a matrix. Raises ValueError: the columns cut groups to less than 16."""
        depth = self._shapes[name][1]
        first = rows.start // _DUMMY_ROWS * _DUMMY_ROWS
        blocks = [self._block(name, start, depth) for start in range(first, rows.stop, _DUMMY_ROWS)]
        codes = torch.cat(blocks)[rows.start - first : rows.stop - first]
        group = group_size(self._scheme, depth)
        scales = torch.full((rows.size, -(-depth // group)), _DUMMY_SCALES[self._kind], dtype=torch.float16)
        zeros = None
        if self._scheme.has_zeros:
            middle, dtype = (8, torch.uint8) if self._kind == "int4" else (0, torch.int8)
            zeros = torch.full(scales.shape, middle, dtype=dtype)
        return QuantizedWeight(self._kind, group, codes, scales, zeros).columns(*columns)

    def _block(self, name: str, start: int, depth: int) -> torch.Tensor:
        digest = hashlib.sha256(f"{self._seed}:{name}:{start}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        if self._kind == "float8_e4m3":
            values = torch.randn(_DUMMY_ROWS, depth, generator=generator)
            return values.to(torch.float8_e4m3fn).view(torch.uint8)
        width = depth * self._scheme.bits // 8
        return torch.randint(0, 256, (_DUMMY_ROWS, width), generator=generator, dtype=torch.uint8)
