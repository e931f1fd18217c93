"""Binding of the compiled matrix products, experts and row operations for bfloat16 models on CPUs.

A weight that the compiled products take is packed once, when it is loaded: the same values in an order that a machine's
vector and matrix units read as it is (`workers/kernels/gemm.h`). A packed weight is told by its shape:

    dense   `[N, K]`        -> `[N / 16, K / 32, 16, 16, 2]`
    experts `[Er, M, I]`    -> `[Er, M / 16, I / 32, 16, 16, 2]`
    gate and up `[Er, 2 I, M]` -> `[Er, I / 16, 2, M / 32, 16, 16, 2]`, strips of gate and up in turn

The PyTorch twins of the functions here are in `layers`, `moe` and `rope`; they serve other types and devices, other
sizes, and machines without a compiler.

Legend: `T` tokens, `M` hidden size, `D` head dim, `I` intermediate, `Er` experts of the shard, `k` experts of a token.
"""

from __future__ import annotations

import ctypes

import torch

from protos.stage.messages import Span
from workers.kernels import abi
from workers.kernels.abi import DEPTH, STRIP, Path
from workers.kernels.build import best_path, load


def path() -> Path | None:
    """Return the instruction set to use; None where PyTorch is faster: no library, or only the portable loops."""
    return best_path() or None


def serves(x: torch.Tensor) -> bool:
    """Whether the compiled functions take a tensor of this type and device."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and path() is not None


def packed_shape(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, pairs: bool) -> tuple[int, ...]:
    """Shape to store a weight `[N, K]` or `[Er, N, K]` in: `shape` itself where it is not packed.

    Args:
        pairs: the weight holds gate, then up.
    """
    rows, depth = shape[-2:]
    even = (DEPTH if shape[:-2] else STRIP) * (2 if pairs else 1)  # an expert's I is the depth of its next product
    if dtype != torch.bfloat16 or device.type != "cpu" or rows % even or depth % DEPTH or path() is None:
        return shape
    strips = (rows // (2 * STRIP), 2) if pairs else (rows // STRIP,)
    return (*shape[:-2], *strips, depth // DEPTH, STRIP, STRIP, 2)


def pack_rows(packed: torch.Tensor, first: int, rows: torch.Tensor, pairs: bool) -> None:
    """Rows `[n, K]` to their place, from row `first` on, in the packed `[N, K]` (one expert's, for experts)."""
    library = load().library
    assert library is not None
    assert packed.is_contiguous()
    assert rows.stride(1) == 1
    count, depth = rows.shape
    half = packed.numel() // depth // 2 if pairs else 0
    library.longreach_pack(packed.data_ptr(), rows.data_ptr(), first, count, depth, rows.stride(0), half)


def packed(weight: torch.Tensor, pairs: bool = False) -> torch.Tensor:
    """A packed copy of `[N, K]` or `[Er, N, K]`; the weight itself where it is not packed."""
    shape = packed_shape(tuple(weight.shape), weight.dtype, weight.device, pairs)
    if shape == weight.shape:
        return weight
    out = weight.new_empty(shape)
    for target, source in zip(out, weight, strict=True) if weight.dim() == 3 else [(out, weight)]:
        pack_rows(target, 0, source, pairs)
    return out


def unpacked(weight: torch.Tensor) -> torch.Tensor:
    """A packed weight in its plain order, `[N, K]` or `[Er, N, K]`: a copy; any other tensor is returned as it is."""
    if weight.dim() == 7:  # [Er, strip, which, tile, pair, row, of pair]
        experts, strips = weight.shape[:2]
        return weight.permute(0, 2, 1, 5, 3, 4, 6).reshape(experts, 2 * strips * STRIP, -1)
    if weight.dim() == 6:
        return weight.permute(0, 1, 4, 2, 3, 5).reshape(weight.shape[0], weight.shape[1] * STRIP, -1)
    if weight.dim() == 5:
        return weight.permute(0, 3, 1, 2, 4).reshape(weight.shape[0] * STRIP, -1)
    return weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` for `[T, K]` and a packed `[N, K]`: sums in float32, rounded once."""
    x = _rows(x)
    out = x.new_empty(x.shape[0], weight.shape[0] * STRIP)
    sizes = (x.shape[0], x.stride(0), out.shape[1], weight.shape[1] * DEPTH)
    _run("longreach_linear", abi.LinearCall(_at(x), _at(weight), _at(bias), _at(out), *sizes, path(), _threads()))
    return out


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span, rows: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """`moe.run_experts` over packed weights into `out` `[T, M]`, contiguous.

    Args:
        rows: `[T k, M]`, room for what the experts write.

    Raises:
        ValueError: a token uses more than 128 experts.
    """
    x = _rows(x)
    tokens, top_k = experts.shape
    if top_k > abi.MAX_TOP_K:
        raise ValueError(f"num_experts_per_tok: {top_k}: must be at most {abi.MAX_TOP_K}; set LONGREACH_KERNELS=off")
    experts, weights = experts.contiguous(), weights.contiguous()
    pointers = map(_at, (x, experts, weights, gate_up, down, rows, out))
    width = expert_width(gate_up)
    sizes = (tokens, x.stride(0), top_k, local.start, local.size, x.shape[1], width)
    _run("longreach_experts", abi.ExpertsCall(*pointers, *sizes, path(), _threads()))


def expert_width(gate_up: torch.Tensor) -> int:
    """`I` of packed gate and up weights."""
    return gate_up.shape[1] * STRIP


def norms(x: torch.Tensor) -> bool:
    """Whether `rms_norm` takes `[T, M]`."""
    return serves(x) and x.dim() == 2 and x.shape[1] % STRIP == 0 and x.stride(1) == 1


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`layers.rms_norm` for `[T, M]` and `[M]` in bfloat16."""
    out = torch.empty(x.shape, dtype=x.dtype)
    sizes = (x.shape[0], x.stride(0), x.shape[1])
    _run("longreach_rms_norm", abi.NormCall(_at(x), _at(weight), _at(out), *sizes, eps, path(), _threads()))
    return out


def rotates(x: torch.Tensor) -> bool:
    """Whether `norm_rotate` takes `[T, H, D]`."""
    return serves(x) and x.shape[2] % DEPTH == 0 and x.shape[2] <= abi.MAX_ROTATED_DIM and x.stride(2) == 1


def norm_rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor
) -> torch.Tensor:
    """Norm of every head (where `weight` is given) and rotation, rounded once at the end.

    Args:
        x, out: `[T, H, D]` bfloat16, any row and head strides, unit stride in `D`; `out` may be `x`.
        cos, sin: `[T, 1, D / 2]` float32, of the same strides, unit stride in `D`.
        weight: `[H, D]` float32, contiguous.

    Returns:
        `out`.
    """
    assert cos.stride() == sin.stride()
    assert cos.stride(2) == 1
    assert weight is None or weight.is_contiguous()
    assert out.stride(2) == 1
    sizes = (*x.shape, x.stride(0), x.stride(1), out.stride(0), out.stride(1), cos.stride(0))
    pointers = map(_at, (x, out, cos, sin, weight))
    _run("longreach_norm_rotate", abi.RotateCall(*pointers, *sizes, eps, path(), _threads()))
    return out


def routes(logits: torch.Tensor) -> bool:
    """Whether `route` takes `[T, E]`."""
    return serves(logits) and logits.shape[1] <= abi.MAX_EXPERTS


def route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids `[T, k]` and weights `[T, k]` float32 of the largest of `[T, E]`; of equal logits the first is taken."""
    logits = logits.contiguous()
    tokens, count = logits.shape
    chosen = torch.empty(tokens, top_k, dtype=torch.int64)
    weights = torch.empty(tokens, top_k)
    pointers = map(_at, (logits, chosen, weights))
    _run("longreach_route", abi.RouteCall(*pointers, tokens, count, top_k, normalise, path(), _threads()))
    return chosen, weights


def ranks(x: torch.Tensor) -> bool:
    """Whether `highest` takes these values."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous() and path() is not None


def highest(x: torch.Tensor) -> int | None:
    """Index of the greatest value, the first of equal ones; None when one is infinite or not a number."""
    library = load().library
    assert library is not None
    index = int(library.longreach_highest(x.data_ptr(), x.numel(), path()))
    return index if index >= 0 else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()


def _run(name: str, call: ctypes.Structure) -> None:
    library = load().library
    assert library is not None
    if status := getattr(library, name)(ctypes.byref(call)):
        abi.raise_for_status(status, f"{name}: no memory for the packed rows of a step; lower the tokens of a step")
