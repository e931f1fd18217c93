"""Regions of a mapped file: rows, columns, experts and turned heads, of every type, against the whole tensors."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from protos.model.checkpoint import CheckpointError, StoredTensor
from protos.model.gguf.file import READ
from tests.support.gguf_files import random_blocks, write_tensors
from workers.quant.gguf.blocks import KINDS
from workers.quant.gguf.source import GgufSource

DOWN, QUERY = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"


def values_of(data: np.ndarray, kind: Kind, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(data, kind)).reshape(shape))


@pytest.mark.parametrize("kind", [each.name for each in READ.values()])
def test_regions_of_a_matrix(tmp_path: Path, kind: str) -> None:
    data = random_blocks(Kind[kind], (12, 1024))
    whole = values_of(data, Kind[kind], (12, 1024))
    path = write_tensors(
        tmp_path / "m.gguf", {"before": (Kind.Q8_0, random_blocks(Kind.Q8_0, (1, 32))), "t": (Kind[kind], data)}
    )
    stored = StoredTensor(path.name, "t", kind)
    with GgufSource(path, 8) as source:
        for rows in (range(12), range(3, 4), range(5, 12)):
            for columns in (range(1024), range(256, 512), range(13, 700), range(1000, 1024)):
                part = source.plain(DOWN, stored, rows, columns)
                assert torch.equal(part.float(), whole[rows.start : rows.stop, columns.start : columns.stop])


@pytest.mark.parametrize("kind", ["F16", "Q4_1", "Q6_K"])
def test_regions_of_an_expert(tmp_path: Path, kind: str) -> None:
    data = random_blocks(Kind[kind], (3, 8, 256))
    whole = values_of(data, Kind[kind], (3, 8, 256))
    path = write_tensors(tmp_path / "m.gguf", {"t": (Kind[kind], data)})
    with GgufSource(path, 8) as source:
        for expert in range(3):
            stored = StoredTensor(path.name, "t", kind, expert)
            part = source.plain(DOWN, stored, range(2, 7), range(32, 256))
            assert torch.equal(part.float(), whole[expert, 2:7, 32:])


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_rows_are_the_plain_ones(tmp_path: Path, kind: str) -> None:
    data = random_blocks(Kind[kind], (2, 16, 512))
    path = write_tensors(tmp_path / "m.gguf", {"t": (Kind[kind], data)})
    with GgufSource(path, 8) as source:
        for name in (DOWN, QUERY):
            stored = StoredTensor(path.name, "t", kind, 1)
            weight = source.quantized(name, stored, range(3, 13), exact=True)
            assert weight.shape == (10, 512)
            plain = source.plain(name, stored, range(3, 13), range(512))
            assert torch.allclose(weight.dequantize(torch.float32), plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_heads_of_llama_are_turned_back(tmp_path: Path, kind: str) -> None:
    data = random_blocks(Kind[kind], (24, 64))
    stored_values = values_of(data, Kind[kind], (24, 64))
    turned = stored_values.reshape(3, 4, 2, 64).transpose(1, 2).reshape(24, 64)  # heads of 8 rows
    for architecture, expected in (("llama", turned), ("qwen2", stored_values)):
        path = write_tensors(tmp_path / f"{architecture}.gguf", {"t": (Kind[kind], data)}, architecture)
        with GgufSource(path, 8) as source:
            for rows in (range(24), range(8, 16), range(5, 19)):
                part = source.plain(QUERY, StoredTensor(path.name, "t", kind), rows, range(32, 64))
                assert torch.equal(part, expected[rows.start : rows.stop, 32:])


def test_vectors(tmp_path: Path) -> None:
    data = random_blocks(Kind.F32, (24,))
    values = values_of(data, Kind.F32, (24,))
    path = write_tensors(tmp_path / "m.gguf", {"t": (Kind.F32, data)})
    stored = StoredTensor(path.name, "t", "F32")
    with GgufSource(path, 8) as source:
        assert torch.equal(source.plain("model.norm.weight", stored, range(2, 9)), values[2:9])
        bias = source.plain("model.layers.0.self_attn.k_proj.bias", stored, range(8, 24))
    assert torch.equal(bias, values.reshape(3, 4, 2).transpose(1, 2).reshape(24)[8:])


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"m\.gguf: cannot be read"):
        GgufSource(tmp_path / "m.gguf", 8)
