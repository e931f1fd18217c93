"""The parts of quantised matrices in the index of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from protos.model.checkpoint import Checkpoint, CheckpointError, expected_tensors
from protos.model.quant.parts import parts_of
from protos.model.quant.scheme import QuantScheme
from protos.model.spec import ModelSpec
from protos.model.weight_files import read_headers
from tests.unit.protos.model.test_checkpoint import MOE, Tensors, write_checkpoint

GPTQ = replace(MOE, quant=QuantScheme("gptq", 4, group=16))
DOWN_PROJ = "model.layers.1.mlp.experts.2.down_proj"


def quantized_tensors(spec: ModelSpec) -> Tensors:
    """The tensors of a checkpoint of GPTQ: every matrix of a layer but the router in its parts."""
    found: Tensors = {}
    for name, shape in expected_tensors(spec).items():
        if not name.endswith("_proj.weight") or spec.quant is None:
            found[name] = ("BF16", shape)
            continue
        for part in parts_of(spec.quant, *shape):
            found[f"{name.removesuffix('.weight')}.{part.name}"] = (part.dtypes[0], part.shapes[0])
    return found


def test_parts_of_quantized_matrices(tmp_path: Path) -> None:
    tensors = quantized_tensors(GPTQ)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors), GPTQ)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert checkpoint.is_quantized(f"{DOWN_PROJ}.weight")
    assert not checkpoint.is_quantized("model.layers.1.mlp.gate.weight")


@pytest.mark.parametrize(
    "scheme", [QuantScheme("awq", 4), QuantScheme("fp8", 8, is_float=True, group=16, block_rows=4)]
)
def test_other_formats_and_plain_matrices_beside_them(tmp_path: Path, scheme: QuantScheme) -> None:
    spec = replace(MOE, quant=scheme)
    kept = "model.layers.0.self_attn.k_proj"
    tensors = {name: value for name, value in quantized_tensors(spec).items() if not name.startswith(f"{kept}.")}
    tensors[f"{kept}.weight"] = ("F16", expected_tensors(spec)[f"{kept}.weight"])
    tensors[f"{DOWN_PROJ}.input_scale"] = ("F32", (1,))  # of activations
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tensors), spec)
    assert not checkpoint.is_quantized(f"{kept}.weight")
    assert checkpoint.is_quantized(f"{DOWN_PROJ}.weight")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{DOWN_PROJ}.scales": None}, "down_proj.scales: missing from the checkpoint"),
        ({f"{DOWN_PROJ}.qweight": None}, "down_proj.weight: missing from the checkpoint"),
        ({f"{DOWN_PROJ}.qweight": ("I32", (1, 9))}, r"down_proj.qweight: shape \[1, 9\]"),
        ({f"{DOWN_PROJ}.qzeros": ("BF16", (1, 1))}, "qzeros: dtype BF16: must be one of I32"),
        ({f"{DOWN_PROJ}.weight_scale": ("BF16", (1,))}, "weight_scale: not a tensor of the model"),
        ({"model.layers.1.mlp.gate.qweight": ("I32", (1, 3))}, "gate.qweight: not a tensor of the model"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    tensors = quantized_tensors(GPTQ) | changes
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(write_checkpoint(tmp_path, tensors), GPTQ)


def test_a_bias_of_zeros_beside_quantized_matrices(tmp_path: Path) -> None:
    """`write_file` fills tensors with zeros."""
    bias = {"model.layers.0.self_attn.o_proj.bias": ("F16", (8,))}
    folder = write_checkpoint(tmp_path, quantized_tensors(GPTQ) | bias)
    Checkpoint.open(folder, GPTQ)
    path = folder / "model.safetensors"
    header = read_headers(folder)["model.layers.0.self_attn.o_proj.bias"]
    content = bytearray(path.read_bytes())
    content[header.start] = 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"o_proj.bias: not a tensor of the model"):
        Checkpoint.open(folder, GPTQ)
