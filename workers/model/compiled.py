"""The compiled matrix products, experts and row operations for bfloat16 models on CPUs (workers/kernels/gemm).

A weight of these products is packed once, when it is loaded: the same values in an order that vector and matrix units
load without rearranging (`workers/kernels/gemm/gemm.h`). A packed bfloat16 weight is recognised by its shape:

    dense   `[N, K]`        -> `[N / 16, K / 32, 16, 16, 2]`
    experts `[Er, M, I]`    -> `[Er, M / 16, I / 32, 16, 16, 2]`
    gate and up `[2 I, M]`  -> `[I / 16, 2, M / 32, 16, 16, 2]`
    gate and up `[Er, 2 I, M]` -> `[Er, I / 16, 2, M / 32, 16, 16, 2]`, strips of gate and up in turn

A quantised weight is a `PackedWeight`: its codes are multiplied without being unpacked in memory.

The PyTorch implementations in `layers`, `moe` and `rope` are the fallback for other types, devices and sizes, and for
machines without a compiler.

Legend: `T` tokens, `M` hidden size, `D` head dim, `I` intermediate, `Er` experts of the shard, `k` experts of a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TypeAlias, TypeGuard

import torch

from protos.stage.messages import Span
from workers.kernels import abi
from workers.kernels.abi import DEPTH, STRIP, Path
from workers.kernels.build import best_path, exported
from workers.quant.packed import PackedWeight, can_pack
from workers.quant.weight import KINDS, QuantizedWeight

Packed: TypeAlias = torch.Tensor | PackedWeight  # a tensor of more than three dimensions, as above


def path() -> Path | None:
    """Return the instruction set to use; None where PyTorch is used: no library, or only its portable code."""
    return best_path() or None


def _is_supported(x: torch.Tensor) -> bool:
    """Return whether the compiled functions take a tensor of this type and device."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and path() is not None


def packed_shape(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pairs: bool) -> tuple[int, ...]:
    """Return the shape that stores a weight `[N, K]` or `[Er, N, K]`: `shape` itself where it is not packed.

    Args:
        pairs: the weight holds gate, then up.
    """
    rows, depth = shape[-2:]
    even = (DEPTH if shape[:-2] else STRIP) * (2 if pairs else 1)  # an expert's I is the depth of its second product
    if dtype != torch.bfloat16 or device.type != "cpu" or rows % even or depth % DEPTH or path() is None:
        return shape
    strips = (rows // (2 * STRIP), 2) if pairs else (rows // STRIP,)
    return (*shape[:-2], *strips, depth // DEPTH, STRIP, STRIP, 2)


def pack_rows(packed: torch.Tensor, first: int, rows: torch.Tensor, pairs: bool) -> None:
    """Write rows `[n, K]`, from row `first` of the weight on, into the packed `[N, K]` (of one expert, for experts)."""
    assert packed.is_contiguous()
    assert rows.stride(1) == 1
    count, depth = rows.shape
    half = packed.numel() // depth // 2 if pairs else 0
    exported("longreach_pack")(packed.data_ptr(), rows.data_ptr(), first, count, depth, rows.stride(0), half)


def packed(weight: torch.Tensor, pairs: bool = False) -> torch.Tensor:
    """Return a packed copy of `[N, K]` or `[Er, N, K]`; the weight itself where it is not packed.

    Args:
        pairs: the weight holds gate, then up.
    """
    shape = packed_shape(tuple(weight.shape), weight.dtype, weight.device, pairs)
    if shape == weight.shape:
        return weight
    out = weight.new_empty(shape)
    for target, source in zip(out, weight, strict=True) if weight.dim() == 3 else [(out, weight)]:
        pack_rows(target, 0, source, pairs)
    return out


def is_packed(weight: object) -> TypeGuard[Packed]:
    """Return whether the compiled products take a weight."""
    if isinstance(weight, PackedWeight):
        return True
    return isinstance(weight, torch.Tensor) and weight.dim() > 3


def can_pack_codes(weight: QuantizedWeight, shape: Sequence[int], device: torch.device, pairs: bool) -> bool:
    """Return whether a quantised weight of `shape` and this layout is packed, for models in bfloat16."""
    return device.type == "cpu" and path() is not None and can_pack(weight, shape, pairs)


def describe(weight: Packed) -> abi.Weights:
    """Return the structure of a packed weight; it holds addresses only."""
    if isinstance(weight, torch.Tensor):
        return abi.Weights(values=weight.data_ptr())
    zeros = weight.zeros
    return abi.Weights(
        weight.codes.data_ptr(), weight.scales.data_ptr(), None if zeros is None else zeros.data_ptr(),
        weight.group, KINDS.index(weight.kind) + 1, abi.NUMBER_TYPES[weight.scales.dtype],
        0 if zeros is None else abi.NUMBER_TYPES[zeros.dtype],
    )  # fmt: skip


def linear(x: torch.Tensor, weight: Packed, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `x @ weight.T + bias` for `[T, K]` and a packed `[N, K]`: summed in float32, rounded once.

    Of gate and up in pairs, 16 outputs of each take turns.
    """
    x = _contiguous_rows(x)
    depth = x.shape[1]
    rows, width = weight.shape if isinstance(weight, PackedWeight) else (weight.numel() // depth, depth)
    assert width == depth
    out = x.new_empty(x.shape[0], rows)
    sizes = (x.shape[0], x.stride(0), rows, depth)
    _run("longreach_linear", abi.LinearCall, (x, bias, out), describe(weight), *sizes)
    return out


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: Packed, down: Packed,
    local: Span, rows: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Compute `moe.run_experts` over packed weights into `out` `[T, M]`, contiguous.

    Args:
        rows: `[T k, M]`, scratch for the outputs of the experts.

    Raises:
        ValueError: a token uses more than 128 experts.
    """
    x = _contiguous_rows(x)
    tokens, top_k = experts.shape
    if top_k > abi.MAX_TOP_K:
        raise ValueError(f"num_experts_per_tok: {top_k}: must be at most {abi.MAX_TOP_K}; set LONGREACH_KERNELS=off")
    sizes = (tokens, x.stride(0), top_k, local.start, local.size, x.shape[1], expert_width(gate_up))
    tensors = (x, experts.contiguous(), weights.contiguous(), rows, out)
    _run("longreach_experts", abi.ExpertsCall, tensors, describe(gate_up), describe(down), *sizes)


def run_mlp(x: torch.Tensor, gate_up: Packed, down: Packed) -> torch.Tensor:
    """Compute a gated MLP of `[T, M]`, whose weights are packed as those of one expert (`is_mlp`)."""
    out = torch.empty(x.shape, dtype=x.dtype)
    experts, weights = torch.zeros(x.shape[0], 1, dtype=torch.int64), torch.ones(x.shape[0], 1)
    run_experts(x, experts, weights, gate_up, down, Span(0, 1), torch.empty_like(out), out)
    return out


def expert_width(gate_up: Packed) -> int:
    """Return `I` of packed gate and up weights, of experts or of an MLP."""
    return gate_up.shape[-2] // 2 if isinstance(gate_up, PackedWeight) else gate_up.shape[-6] * STRIP


def has_pairs(gate_up: Packed) -> bool:
    """Return whether strips of gate and of up take turns in a matrix `[2 I, M]`."""
    return gate_up.pairs if isinstance(gate_up, PackedWeight) else gate_up.dim() == 6


def fits_mlp(hidden: int, width: int) -> bool:
    """Return whether a gated MLP of these sizes can be packed as one expert."""
    return hidden % DEPTH == 0 and width % DEPTH == 0


def supports_rms_norm(x: torch.Tensor) -> bool:
    """Return whether `rms_norm` takes `x` `[T, M]`."""
    return _is_supported(x) and x.dim() == 2 and x.shape[1] % STRIP == 0 and x.stride(1) == 1


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, delta: torch.Tensor | None = None) -> torch.Tensor:
    """Compute `layers.rms_norm` for `[T, M]` and `[M]` in bfloat16.

    Args:
        delta: `[T, M]`, contiguous; it becomes `x + delta`, and that is normed.
    """
    assert delta is None or (delta.is_contiguous() and delta.shape == x.shape and delta.dtype == x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    _run("longreach_rms_norm", abi.NormCall, (x, weight, out, delta), x.shape[0], x.stride(0), x.shape[1], eps)
    return out


def supports_norm_rotate(x: torch.Tensor) -> bool:
    """Return whether `norm_rotate` takes `x` `[T, H, D]`."""
    return _is_supported(x) and x.shape[2] % DEPTH == 0 and x.shape[2] <= abi.MAX_ROTATED_DIM and x.stride(2) == 1


def norm_rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """Normalise every head (where there is a `weight`) and rotate it; the result is rounded once.

    Args:
        x, out: `[T, H, D]` bfloat16, any row and head strides, unit stride in `D`; `out` may be `x`.
        cos, sin: `[T, 1, D / 2]` float32 with equal strides, unit stride in `D`.
        weight: `[H, D]` float32, contiguous.

    Returns:
        `out`.
    """
    assert cos.stride() == sin.stride()
    assert cos.stride(2) == 1
    assert weight is None or weight.is_contiguous()
    assert out.stride(2) == 1
    sizes = (*x.shape, x.stride(0), x.stride(1), out.stride(0), out.stride(1), cos.stride(0))
    _run("longreach_norm_rotate", abi.RotateCall, (x, out, cos, sin, weight), *sizes, eps)
    return out


def supports_route(logits: torch.Tensor) -> bool:
    """Return whether `route` takes `logits` `[T, E]`."""
    return _is_supported(logits) and logits.shape[1] <= abi.MAX_EXPERTS


def route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids `[T, k]` and weights `[T, k]` (float32) of the largest of `[T, E]`; of equal logits the first ones."""
    logits = logits.contiguous()
    tokens, count = logits.shape
    chosen = torch.empty(tokens, top_k, dtype=torch.int64)
    weights = torch.empty(tokens, top_k)
    _run("longreach_route", abi.RouteCall, (logits, chosen, weights), tokens, count, top_k, normalise)
    return chosen, weights


def _contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _run(
    name: str, call: type[ctypes.Structure], tensors: Sequence[torch.Tensor | None],
    *others: float | abi.Weights,
) -> None:  # fmt: skip
    """Call an exported function with addresses, the other arguments, instruction set and threads, in this order."""
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    arguments = call(*addresses, *others, path(), torch.get_num_threads())
    if status := exported(name)(ctypes.byref(arguments)):
        abi.raise_for_status(status, f"{name}: no memory for the packed rows of a step; lower the tokens of a step")
