"""Matrices and checkpoints in every quantised format, packed value by value as the formats are described.

Legend: `N` rows (outputs), `K` columns (inputs), `G` groups of a row.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from protos.model.quant.scheme import QuantScheme

Tensors = dict[str, torch.Tensor]
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """`[a, b]` values below `2 ** bits` -> int32 `[a, ceil(b * bits / 32)]`, the first in the lowest bits."""
    count = 32 // bits
    padded = np.zeros((values.shape[0], -(-values.shape[1] // count) * count), np.uint64)
    padded[:, : values.shape[1]] = values
    out = np.zeros((values.shape[0], padded.shape[1] // count), np.uint64)
    for place in range(count):
        source = place if order is None else order[place]
        out |= padded[:, source::count] << np.uint64(bits * place)
    return out.astype(np.uint32).view(np.int32)


@dataclass
class Quantized:
    """One matrix: its codes (unsigned for whole numbers), and what it stands for."""

    codes: np.ndarray  # [N, K]: 0 .. 2 ** bits - 1, or FP8 bits
    scales: torch.Tensor  # [N, G], or of blocks
    zeros: np.ndarray | None  # [N, G], unsigned
    of_group: np.ndarray  # [K]
    values: torch.Tensor  # [N, K] float32


def quantize(
    weight: torch.Tensor, scheme: QuantScheme, scale_dtype: torch.dtype, shuffled: bool = False, whole: bool = False
) -> Quantized:  # fmt: skip
    """Round a matrix `[N, K]` to a scheme. `whole`: one scale for all of it. `shuffled`: groups of any inputs."""
    rows, depth = weight.shape
    group = min(scheme.group or depth, depth)
    of_group = np.arange(depth) // group
    if shuffled:
        of_group = of_group[np.random.default_rng(depth).permutation(depth)]
    groups, block = int(of_group.max()) + 1, rows if whole else scheme.block_rows or 1
    largest = torch.zeros(-(-rows // block), groups)
    for g in range(groups):
        columns = weight[:, torch.from_numpy(of_group == g)].abs().amax(1)
        for b in range(largest.shape[0]):
            largest[b, g] = columns[b * block : (b + 1) * block].max()
    half = 448.0 if scheme.is_float else float(1 << (scheme.bits - 1))
    scales = (largest / half * (1.6 if scheme.has_zeros else 1.1)).clamp(min=1e-4).to(scale_dtype)
    wide = scales.float()[np.arange(rows) // block][:, of_group]
    if scheme.is_float:
        codes = (weight / wide).to(torch.float8_e4m3fn)
        return Quantized(codes.view(torch.uint8).numpy(), scales, None, of_group, codes.float() * wide)
    zeros = np.full((rows, groups), int(half))
    if scheme.has_zeros:
        zeros = np.random.default_rng(rows).integers(int(half) - 4, int(half) + 5, (rows, groups))
        zeros = zeros if block == 1 else np.broadcast_to(zeros[:1], zeros.shape)
    points = torch.from_numpy(np.ascontiguousarray(zeros))[:, of_group].float()
    codes = ((weight / wide).round() + points).clamp(0, 2 * half - 1)
    return Quantized(codes.numpy().astype(np.int64), scales, zeros, of_group, (codes - points) * wide)


def parts(made: Quantized, scheme: QuantScheme, form: str = "") -> Tensors:
    """The tensors of a matrix as the format stores them; `form` is the shape of scales of rows."""
    bits, zeros = scheme.bits, made.zeros
    shape = torch.tensor(made.codes.shape)
    if scheme.format in ("gptq", "awq"):
        assert zeros is not None
        order = _AWQ if scheme.format == "awq" else None
        stored = (zeros - scheme.zero_offset).T % (1 << bits)
        out = {"qzeros": pack(stored, bits, order)}
        out["qweight"] = pack(made.codes, bits).T if order is None else pack(made.codes.T, bits, order)
        tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in out.items()}
        tensors["scales"] = made.scales.T.contiguous()
        if scheme.format == "gptq":
            tensors["g_idx"] = torch.from_numpy(made.of_group).int()
        return tensors
    scales = {"row": made.scales[:, 0], "scalar": made.scales.reshape(-1)[:1].reshape(())}.get(form, made.scales)
    if scheme.format == "pack-quantized":
        tensors = {"weight_packed": torch.from_numpy(pack(made.codes, bits)), "weight_scale": scales}
        tensors["weight_shape"] = shape
        if scheme.has_zeros and zeros is not None:
            packed = np.ascontiguousarray(pack(zeros.T, bits).T)
            tensors["weight_zero_point"] = torch.from_numpy(packed)
        if scheme.ordered:
            tensors["weight_g_idx"] = torch.from_numpy(made.of_group).int()
        return tensors
    name = "weight_scale_inv" if scheme.format == "fp8" and scheme.group else "weight_scale"
    if scheme.is_float:
        return {"weight": torch.from_numpy(made.codes).view(torch.float8_e4m3fn), name: scales.contiguous()}
    tensors = {"weight": torch.from_numpy(made.codes - 128).to(torch.int8), name: scales.contiguous()}
    if scheme.has_zeros and zeros is not None:
        points = torch.from_numpy(np.ascontiguousarray(zeros) - 128).to(torch.int8)
        tensors["weight_zero_point"] = points.reshape(scales.shape) if form == "row" else points
    return tensors


def quantize_checkpoint(
    source: Path, folder: Path, config: dict[str, Any], scheme: QuantScheme, *,
    keep: Callable[[str], bool] = lambda name: False, shuffled: bool = False, scale_dtype: torch.dtype = torch.float16,
) -> tuple[Path, Path]:  # fmt: skip
    """Write a checkpoint as two: quantised, and plain float32 with the values that the other stands for.

    Args:
        keep: which matrices of layers stay plain beside routers; the output matrix does unless `scheme` says other.
    """
    quantised, plain = folder / "quantised", folder / "plain"
    tensors: Tensors = load_file(source / "model.safetensors")
    one, two = {}, {}
    for name, tensor in tensors.items():
        is_matrix = tensor.dim() == 2 and (".layers." in name or (scheme.head and name == "lm_head.weight"))
        if not is_matrix or name.endswith("mlp.gate.weight") or keep(name):
            one[name] = two[name] = tensor
            continue
        made = quantize(tensor.float(), scheme, scale_dtype, shuffled and scheme.ordered)
        two[name] = made.values
        module = name.removesuffix(".weight")
        one |= {f"{module}.{part}": value.contiguous() for part, value in parts(made, scheme).items()}
    for target, content in ((quantised, one), (plain, two)):
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file(content, target / "model.safetensors", metadata={"format": "pt"})
    file = quantised / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config}))
    return quantised, plain
