"""Headers of safetensors files: bounds before bytes, what a file is instead, and how index and files agree."""

from __future__ import annotations

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protos.model.weight_files import CheckpointError, read_headers, unnamed_files, weight_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    header, data = {}, b""
    for name, content in tensors.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "F32", "shape": [len(content) // 4], "data_offsets": offsets}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def index(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path) -> str:
    """The text of the refusal, which takes neither time nor memory."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_headers(folder)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 5.0
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text.replace(f"{folder}/", "")


def raw(length: int, size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with path.open("wb") as handle:
            handle.write(struct.pack("<Q", length) + b"{")
            handle.truncate(size)

    return write


def header(text: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text) and None


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (raw((1 << 64) - 1, 1 << 20), "damaged or truncated (1048576 bytes, with a header of 18446744073709551615)"),
        (raw(1 << 40, 1 << 20), "damaged or truncated (1048576 bytes, with a header of 1099511627776)"),
        (raw(100_000_000, 1 << 32), "a header of 100000000 bytes: at most 16777216 are read"),
        (header(b'{"a":' * 3_000_000), "damaged or truncated ("),
        (header(b"[" * 100), "damaged or truncated ("),
        (header(b"[]"), "damaged or truncated ("),
        (header(b'{"a": 1}'), "damaged or truncated ("),
        (header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}'), "damaged or truncated ("),
        (
            header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
            "damaged or truncated (69 of 77 byte",
        ),
        (header(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": ["0", "0"]}}'), "damaged or truncated ("),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
            "a Git LFS pointer, not the file",
        ),
        (lambda path: path.write_text("<!DOCTYPE html>\n"), "a web page, not the file itself"),
        (lambda path: path.write_bytes(b"GGUF" + bytes(100)), "a GGUF file under another name"),
        (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)), "a PyTorch file under another name"),
        (lambda path: path.write_bytes(bytes(4096)), "begins with zeros, so its download was not finished"),
        (os.mkfifo, "cannot be read (not a regular file)"),
        (lambda path: path.mkdir(), "cannot be read (Is a directory)"),
        (lambda path: path.symlink_to("../../blobs/77"), "no such file: a link to ../../blobs/77, which is not there"),
    ],
)
def test_what_is_no_weight_file(tmp_path: Path, write: Callable[[Path], object], said: str) -> None:
    write(tmp_path / SINGLE)
    assert refused(tmp_path).startswith(f"{SINGLE}: {said}")


def test_headers_of_many_files_are_bounded_together(tmp_path: Path) -> None:
    text = b'{"__metadata__": {"x": "' + b"a" * (14 << 20) + b'"}}'
    for number in range(5):
        header(text)(tmp_path / f"{number}.safetensors")
    index(tmp_path, {f"t{number}": f"{number}.safetensors" for number in range(5)})
    with pytest.raises(
        CheckpointError, match=r"4\.safetensors: the headers of all files are larger than 67108864 bytes"
    ):
        read_headers(tmp_path)


def test_a_huge_index_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as handle:
        handle.truncate(1 << 36)
    assert refused(tmp_path).startswith(f"{INDEX}: cannot be read (68719476736 bytes: at most 16777216 are read)")


def test_names_and_values_are_shown_short(tmp_path: Path) -> None:
    index(tmp_path, {"a" * 100_000: "../" + "b" * 100_000})
    assert "must be a .safetensors file of this folder" in refused(tmp_path)


def test_index_and_files(tmp_path: Path) -> None:
    safetensors(tmp_path / "1.safetensors", {"norm.weight": b"aaaa", "both": b"1111"})
    safetensors(tmp_path / "2.safetensors", {"lm_head.weight": b"bbbbcccc", "both": b"2222", "unlisted": b"dddd"})
    safetensors(tmp_path / "3.safetensors", {"other": b"eeee"})
    index(tmp_path, {"norm.weight": "1.safetensors", "lm_head.weight": "2.safetensors", "both": "2.safetensors"})
    headers = read_headers(tmp_path)
    assert {name: found.path.name for name, found in headers.items()} == {
        "model.norm.weight": "1.safetensors", "lm_head.weight": "2.safetensors", "both": "2.safetensors",
        "unlisted": "2.safetensors",
    }  # fmt: skip
    assert headers["model.norm.weight"].name == "norm.weight"
    assert (weight_files(tmp_path), unnamed_files(tmp_path)) == (["1.safetensors", "2.safetensors"], ["3.safetensors"])
    assert not headers["both"].has_data_of(headers["unlisted"])
    assert headers["both"].has_data_of(headers["both"])


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        (
            {"a": "1.safetensors", "c": "1.safetensors"},
            "1.safetensors: c: not in the file that " + INDEX + " names: down",
        ),
        (
            {"a": "2.safetensors", "b": "1.safetensors"},
            "2.safetensors: a: not in the file that " + INDEX + " names, but ",
        ),
        (
            {"a": "1.safetensors", "b": "9.safetensors"},
            "9.safetensors: no such file: named by " + INDEX + ": download it",
        ),
    ],
)
def test_an_index_that_is_not_that_of_the_files(tmp_path: Path, weight_map: dict[str, str], said: str) -> None:
    safetensors(tmp_path / "1.safetensors", {"a": b"aaaa"})
    safetensors(tmp_path / "2.safetensors", {"b": b"bbbb"})
    index(tmp_path, weight_map)
    assert refused(tmp_path).startswith(said)


def test_an_interrupted_download(tmp_path: Path) -> None:
    index(tmp_path, {"a": "1.safetensors"})
    (tmp_path / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "download" / "x.incomplete").write_text("")
    assert refused(tmp_path).endswith("its download was interrupted; start the same download again")


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    safetensors(tmp_path / SINGLE, {"norm.weight": b"aaaa", "model.norm.weight": b"aaaa"})
    assert refused(tmp_path) == f"{SINGLE}: model.norm.weight: also stored as norm.weight in {SINGLE}; keep one"


def test_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    safetensors(tmp_path / SINGLE, {"a": b"aaaa"})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert read_headers(tmp_path)  # left over from a merge
    (tmp_path / "adapter_model.safetensors").write_text("")
    assert refused(tmp_path).startswith("adapter_config.json: a LoRA adapter is not applied: merge it with peft")
