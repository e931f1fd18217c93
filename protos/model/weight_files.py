"""The safetensors files of a folder: which they are, and what their headers say.

Headers are bounded before they are read: 16 MiB a file, 64 MiB in all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open

from protos.errors import UserError
from protos.model.files import AGAIN, MAX_JSON, ORIGINAL, open_regular, shown, what_it_is
from protos.model.folder import ADAPTER, INDEX, explain, interrupted_downloads
from protos.model.json_fields import ModelConfigError, read_json_value
from protos.model.tensor_names import canonical

DTYPES = ("F32", "BF16", "F16")
_SINGLE = "model.safetensors"
_MAX_HEADERS = 4 * MAX_JSON  # bytes, of all files together
_COMPARED = 4 << 20  # bytes of two tensors that are compared at once


class CheckpointError(UserError):
    """Weights that are missing, damaged, or not those of the model in `config.json`."""


class Header(NamedTuple):
    """One stored tensor: its file, its name there, and the place of its data in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def error(self, problem: str) -> CheckpointError:
        """Return the error of this tensor."""
        return CheckpointError(f"{self.path}: {shown(self.name)}: {problem}")

    def check(self, *allowed: tuple[int, ...], dtypes: tuple[str, ...] = DTYPES) -> None:
        """Raise CheckpointError unless the shape is one of these, and the dtype one of `dtypes`."""
        if self.dtype not in dtypes:
            plain = self.dtype == "F64" or dtypes is not DTYPES
            hint = "" if plain else f"; quantized weights that config.json does not describe are not read: {ORIGINAL}"
            raise self.error(f"dtype {self.dtype}: must be one of {', '.join(dtypes)}{hint}")
        if self.shape not in allowed:
            shapes = " or ".join(str(list(shape)) for shape in allowed)
            raise self.error(f"shape {shown(str(list(self.shape)))}: config.json asks for {shapes}")

    def has_data_of(self, other: Header) -> bool:
        """Return whether two tensors are equal, byte by byte."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return False
        with open_regular(self.path) as mine, open_regular(other.path) as theirs:
            pairs = zip(_blocks(mine, self), _blocks(theirs, other), strict=True)
            return all(one == two for one, two in pairs)

    def is_zero(self) -> bool:
        """Return whether all bytes of a tensor are zero."""
        with open_regular(self.path) as handle:
            return all(block.count(0) == len(block) for block in _blocks(handle, self))


def _blocks(handle: BinaryIO, header: Header) -> Iterator[bytes]:
    handle.seek(header.start)
    for start in range(header.start, header.stop, _COMPARED):
        yield handle.read(min(_COMPARED, header.stop - start))


def read_headers(model_dir: Path) -> dict[str, Header]:
    """Return all stored tensors by canonical name; one that the index names is taken from the file it names.

    Raises CheckpointError: a file is missing, damaged, too large to be one, or disagrees with the index.
    """
    _refuse_adapter(model_dir)
    weight_map = _weight_map(model_dir)
    headers: dict[str, Header] = {}
    files: dict[str, str] = {}  # of every stored name
    budget = _MAX_HEADERS
    for file in _files(weight_map):
        path = model_dir / file
        length, entries = _read_file(path, weight_map is not None)
        budget -= length
        if budget < 0:
            raise CheckpointError(f"{path}: the headers of all files are larger than {_MAX_HEADERS} bytes")
        for name, entry in entries.items():
            files[name] = file
            if weight_map is not None and weight_map.get(name, file) != file:
                continue
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            header = Header(path, name, entry["dtype"], tuple(entry["shape"]), start, stop)
            if (other := headers.setdefault(canonical(name), header)) is not header:
                raise header.error(f"also stored as {shown(other.name)} in {other.path.name}; keep one")
    _compare_index(model_dir, weight_map or {}, files)
    return headers


def _refuse_adapter(model_dir: Path) -> None:
    """Raise CheckpointError for weights with a LoRA adapter beside them, which transformers would apply."""
    if os.path.lexists(model_dir / ADAPTER) and any(islice(model_dir.glob("adapter_model.*"), 1)):
        raise CheckpointError(
            f"{model_dir / ADAPTER}: a LoRA adapter is not applied: merge it with peft (merge_and_unload) and use "
            f"the merged folder, or move {ADAPTER} and its weights away"
        )


def _compare_index(model_dir: Path, weight_map: dict[str, str], files: dict[str, str]) -> None:
    for name, file in weight_map.items():
        if (found := files.get(name)) is None or (found != file and not _holds(model_dir / file, name)):
            where = f", but in {found}: correct the index, or {AGAIN}" if found else f": {AGAIN}"
            raise CheckpointError(f"{model_dir / file}: {shown(name)}: not in the file that {INDEX} names{where}")


def _holds(path: Path, name: str) -> bool:
    return name in _read_file(path, True)[1]


def _read_file(path: Path, indexed: bool) -> tuple[int, dict[str, Any]]:
    """Return the length of a file's header and what it says by tensor; safetensors has checked all of it."""
    try:
        with open_regular(path) as handle:
            size, head = os.fstat(handle.fileno()).st_size, handle.read(512)
            if words := what_it_is(head):
                raise CheckpointError(f"{path}: {words}")
            length = header_length(path, size, head)
            handle.seek(8)
            entries = json.loads(handle.read(length))
        entries.pop("__metadata__", None)
        whole = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if whole > size:
            raise _damaged(path, f"{size} of {whole} bytes")
        with safe_open(path, framework="np"):
            return length, entries
    except FileNotFoundError as error:
        raise _absent(path, indexed) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except CheckpointError:
        raise
    except (SafetensorError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise _damaged(path, shown((str(error) or type(error).__name__).splitlines()[0])) from error


def header_length(path: Path, size: int, head: bytes) -> int:
    """Return the bytes of the header of a file of `size` bytes that begins with `head`. Raises CheckpointError."""
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > size - 8:
        raise _damaged(path, f"{size} bytes, with a header of {length}")
    if length > MAX_JSON:
        raise CheckpointError(f"{path}: a header of {length} bytes: at most {MAX_JSON} are read")
    return length


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged or truncated ({reason}): {AGAIN}")


def _absent(path: Path, indexed: bool) -> CheckpointError:
    named = f": named by {INDEX}" if indexed else ""
    if path.is_symlink():
        return CheckpointError(f"{path}: no such file{named}: a link to {path.readlink()}, which is not there: {AGAIN}")
    unfinished = interrupted_downloads(path.parent)
    way_out = "its download was interrupted; start the same download again" if unfinished else AGAIN
    return CheckpointError(f"{path}: no such file{named}: {way_out}")


def _weight_map(model_dir: Path) -> dict[str, str] | None:
    """Return the `weight_map` of the index, None for a checkpoint in one file, which goes first as in transformers."""
    path = model_dir / INDEX
    if os.path.lexists(model_dir / _SINGLE):
        return None
    if not os.path.lexists(path):
        raise CheckpointError(f"{model_dir}: neither {_SINGLE} nor {INDEX}: {explain(model_dir)}")
    try:
        value = read_json_value(path)
    except ModelConfigError as error:
        raise CheckpointError(str(error)) from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: must be an object of tensor name to file name")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or set(file) & set("/\\\0"):
            named = f"{shown(ascii(name))}: {shown(ascii(file))}"
            raise CheckpointError(f"{path}: weight_map: {named}: must be a .safetensors file of this folder")
    return weight_map


def _files(weight_map: dict[str, str] | None) -> list[str]:
    return [_SINGLE] if weight_map is None else sorted(set(weight_map.values()))


def weight_files(model_dir: Path) -> list[str]:
    """Return the names of the weight files. Raises CheckpointError."""
    return _files(_weight_map(model_dir))


def unnamed_files(model_dir: Path) -> list[str]:
    """Return the safetensors files of the folder that the checkpoint does not consist of."""
    named = set(weight_files(model_dir))
    return sorted(path.name for path in islice(model_dir.glob("*.safetensors"), 10_000) if path.name not in named)
