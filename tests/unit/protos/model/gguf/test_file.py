"""The header reader against the reference library, and one clear error for each kind of damage."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from protos.model.files import is_gguf
from protos.model.gguf.file import READ, GgufError, read_gguf
from tests.support.gguf_files import random_blocks, write_tensors

KINDS = [Kind[each.name] for each in READ.values()]
SETTINGS: dict[str, Any] = {
    "a.text": "Grüße, 世界", "a.true": True, "a.count": 7, "a.number": 0.5, "a.numbers": [1, -2, 3],
    "a.words": ["", "Ġ", "ü"], "a.floats": [0.5, 1.5],
}  # fmt: skip


def write(path: Path, settings: dict[str, Any] | None = None, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in (settings or {}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for number, kind in enumerate(KINDS):
        writer.add_tensor(f"t{number}", random_blocks(kind, (3, 256), number), raw_dtype=kind)
    writer.add_tensor("stack", np.zeros((2, 3, 5), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [None, 64])
def test_header_is_what_the_reference_reads(tmp_path: Path, alignment: int | None) -> None:
    path = write(tmp_path / "m.gguf", SETTINGS, alignment)
    file, reference = read_gguf(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert file.settings == fields
    assert {key: file.settings[key] for key in SETTINGS} == SETTINGS
    assert file.architecture == "llama"
    assert len(file.tensors) == len(reference.tensors) == len(KINDS) + 1
    for theirs in reference.tensors:
        ours = file.tensors[theirs.name]
        assert (ours.kind.name, ours.start, ours.num_bytes) == (
            theirs.tensor_type.name, theirs.data_offset, theirs.n_bytes,
        )  # fmt: skip
        assert ours.shape == tuple(theirs.shape.tolist()[::-1])
    assert file.tensors["t7"].row_bytes * 3 == file.tensors["t7"].num_bytes


def test_block_sizes_are_the_references() -> None:
    for number, kind in READ.items():
        assert gguf.GGML_QUANT_SIZES[Kind(number)] == (kind.elements, kind.size)
        assert Kind(number).name == kind.name


def test_a_file_is_known_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    assert is_gguf(tmp_path / "absent.GGUF")
    assert not is_gguf(tmp_path / "folder.gguf")
    assert not is_gguf(tmp_path / "model.safetensors")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"a": 1})
    assert read_gguf(path).settings["a"] == 1
    write(path, {"a": 2, "b": 1})
    assert read_gguf(path).settings["a"] == 2


@pytest.mark.parametrize("kind", ["Q2_K", "IQ4_XS", "MXFP4"])
def test_other_types_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    elements, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    data = np.zeros((2, 256 // elements * size), np.uint8)
    path = write_tensors(tmp_path / "m.gguf", {"blk.0.attn_q.weight": (Kind[kind], data)})
    with pytest.raises(GgufError, match=rf"blk\.0\.attn_q\.weight: type {kind} is not read: use a file with F32, F16"):
        read_gguf(path)


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", SETTINGS).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 1200, 37), len(whole) - 64]:
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufError, match=r"cut\.gguf: .*(download|cannot be read)"):
            read_gguf(cut)


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (0, b"PK\3\4", "a PyTorch file under another name"),
        (0, b"vers", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1: too old or too new"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 60), "damaged .a count of"),
        (16, struct.pack("<Q", 1 << 60), "damaged .a count of"),
        (24, struct.pack("<Q", 1 << 63), "damaged .a count of"),
        (24 + 8 + len("general.architecture"), struct.pack("<I", 99), "damaged .a value of type 99"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, at: int, value: bytes, words: str) -> None:
    path = write(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data))
    with pytest.raises(GgufError, match=words) as error:
        read_gguf(path)
    assert "\n" not in str(error.value)


def test_a_split_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m-00001-of-00003.gguf", {"split.count": 3})
    with pytest.raises(GgufError, match=r"split\.count: 3: .*llama-gguf-split --merge"):
        read_gguf(path)


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"m\.gguf: cannot be read \(No such file"):
        read_gguf(tmp_path / "m.gguf")
