"""The C interface of the compiled kernels: types, instruction sets, statuses, structures and exported functions.

Mirrors `abi.h`, `attention/attention.h`, `estimate/estimate.h`, `gemm/weights.h`, `gemm/calls.h` and `gemm/layers.h`;
the comments there say what the fields mean. `declare` compares sizes and limits with the library when it is loaded, so
that a structure that was changed on one side only is found at once. The typed calls are in
`workers.attention.compiled`, `workers.sparse.estimate_compiled`, `workers.model.compiled` and `workers.model.fused`.
"""

from __future__ import annotations

import ctypes
import enum
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # of queries, keys and values
NUMBER_TYPES = TYPES | {torch.float16: 3, torch.uint8: 4}  # of scales and zero points

MAX_HEAD_DIM = 1024  # of attention
STRIP, DEPTH = 16, 32  # outputs and inputs of a tile of packed weights
MAX_ROTATED_DIM = 512  # of a head that `longreach_norm_rotate` takes
MAX_EXPERTS = 4096
MAX_TOP_K = 128  # experts of a token
_LIMITS = (MAX_HEAD_DIM, STRIP, DEPTH, MAX_ROTATED_DIM, MAX_EXPERTS, MAX_TOP_K)


class Path(enum.IntEnum):
    """Instruction sets, the best one last."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3
    AMX = 4


class Status(enum.IntEnum):
    """What an exported function returns."""

    OK = 0
    INVALID = 1
    NO_MEMORY = 2


def raise_for_status(status: int, no_memory: str, invalid: str = "invalid arguments") -> None:
    """Raise the error that a status other than OK stands for.

    Raises:
        MemoryError: there is no room for scratch memory; the message is `no_memory`.
        ValueError: the library refused the arguments; the message is `invalid`.
    """
    if status == Status.NO_MEMORY:
        raise MemoryError(no_memory)
    if status != Status.OK:
        raise ValueError(invalid)


_KINDS: dict[str, Any] = {"void*": c_void_p, "int64": c_int64, "int32": c_int32, "int": c_int, "float": c_float}


def _fields(*declarations: str) -> list[tuple[str, Any]]:
    """Return the fields of declarations such as "int64 rows stride[3]"."""
    fields = []
    for declaration in declarations:
        kind, *names = declaration.split()
        one = Weights if kind == "Weights" else _KINDS[kind]
        for name in names:
            name, _, size = name.rstrip("]").partition("[")
            fields.append((name, one * int(size) if size else one))
    return fields


class AttentionArgs(ctypes.Structure):
    """`attention::Args`."""

    _fields_ = _fields(
        "void* q[3]", "int64 q_row[3] q_head[3]", "void* out keys values", "int64 key_head value_head",
        "void* key_scales value_scales", "int64 key_scale_head value_scale_head",
        "void* pages", "int64 num_pages page_size slots", "void* scales",
        "int64 heads kv_heads dim start length distance tile", "void* offsets num_offsets columns num_columns visited",
        "int q_type kv_type threads path",
    )  # fmt: skip


class EstimateArgs(ctypes.Structure):
    """`estimate::Args`."""

    _fields_ = _fields(
        "void* q[3] scales rows keys key_scales pages",
        "int64 key_head key_scale_head num_rows heads kv_heads dim page_size borders[4]",
        "int kv_head q_type kv_type threads path",
    )


class EstimateSelection(ctypes.Structure):
    """`estimate::Selection`."""

    _fields_ = _fields("void* offsets columns", "int64 num_offsets num_columns")


class Weights(ctypes.Structure):
    """`gemm::Weights`."""

    _fields_ = _fields("void* values scales zeros", "int64 group", "int32 kind scale_type zero_type reserved")


class LinearCall(ctypes.Structure):
    """`gemm::LinearCall`."""

    _fields_ = _fields("void* x bias out", "Weights weight", "int64 rows stride n k", "int32 path threads")


class ExpertsCall(ctypes.Structure):
    """`gemm::ExpertsCall`."""

    _fields_ = _fields(
        "void* x chosen weights rows out",
        "Weights gate_up down",
        "int64 tokens stride top_k first experts hidden_size width",
        "int32 path threads",
    )


class NormCall(ctypes.Structure):
    """`gemm::NormCall`."""

    _fields_ = _fields("void* x weight out delta", "int64 tokens stride size", "float eps", "int32 path threads")


class RotateCall(ctypes.Structure):
    """`gemm::RotateCall`."""

    _fields_ = _fields(
        "void* x out cos sin weight",
        "int64 tokens heads dim row_stride head_stride out_row_stride out_head_stride cos_stride",
        "float eps",
        "int32 path threads",
    )


class RouteCall(ctypes.Structure):
    """`gemm::RouteCall`."""

    _fields_ = _fields("void* logits chosen weights", "int64 tokens experts top_k", "int32 normalise path threads")


class Layer(ctypes.Structure):
    """`gemm::Layer`."""

    _fields_ = _fields(
        "void* input_norm qkv_bias o_bias post_norm",
        "Weights qkv[3] o router gate_up down",
        "void* head_norm keys values key_scales value_scales",
        "int64 kv_head scale_head heads kv_heads dim hidden_size all_experts first experts top_k width",
        "float eps",
        "int32 normalise",
    )


class Piece(ctypes.Structure):
    """`gemm::Piece`."""

    _fields_ = (("args", AttentionArgs), ("row", c_int64))


class Step(ctypes.Structure):
    """`gemm::Step`."""

    _fields_ = _fields(
        "void* x out normed qkv far[2] attended logits rows chosen weights cos[3] sin[3]",
        "int64 cos_stride[3]",
        "void* slots pieces",
        "int64 tokens num_pieces",
        "int32 path threads",
    )


_STRUCTURES = (
    AttentionArgs, EstimateArgs, EstimateSelection, Weights, LinearCall, ExpertsCall, NormCall, RotateCall, RouteCall,
    Layer, Piece, Step,
)  # fmt: skip

# name: (result, *parameters); arrays are passed by address
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "longreach_best_path": (c_int,),
    "longreach_fastest_path": (c_int,),
    "longreach_attend": (c_int, POINTER(AttentionArgs)),
    "longreach_estimate_sums": (c_int, POINTER(EstimateArgs), c_void_p, c_void_p, c_void_p),
    "longreach_estimate_kept": (c_int, POINTER(EstimateArgs), POINTER(EstimateSelection), c_void_p),
    "longreach_estimate_mass": (
        c_int, POINTER(EstimateArgs), c_void_p, c_void_p, c_void_p, POINTER(EstimateSelection), c_void_p,
    ),
    "longreach_estimate_top": (c_int, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int),
    "longreach_pack": (None, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64),
    "longreach_linear": (c_int, POINTER(LinearCall)),
    "longreach_experts": (c_int, POINTER(ExpertsCall)),
    "longreach_rms_norm": (c_int, POINTER(NormCall)),
    "longreach_norm_rotate": (c_int, POINTER(RotateCall)),
    "longreach_route": (c_int, POINTER(RouteCall)),
    "longreach_half_layer": (c_int, POINTER(Layer), POINTER(Step), c_int),
    "longreach_layers": (c_int, POINTER(Layer), c_int64, POINTER(Step), POINTER(c_int64)),
}  # fmt: skip


def declare(library: ctypes.CDLL) -> None:
    """Set result and parameter types of the exported functions, after the check that both sides agree.

    Raises:
        RuntimeError: a structure or limit differs; the sources of library and caller do not belong together.
    """
    ours = [*map(ctypes.sizeof, _STRUCTURES), *_LIMITS]
    numbers = (c_int64 * len(ours))()
    library.longreach_abi.restype = c_int64
    count = library.longreach_abi(numbers, c_int64(len(ours)))
    theirs = list(numbers)
    if count != len(ours) or theirs != ours:
        names = [*(structure.__name__ for structure in _STRUCTURES), *(["limit"] * len(_LIMITS))]
        differ = [f"{name}: {a} and {b}" for name, a, b in zip(names, theirs, ours, strict=True) if a != b]
        raise RuntimeError(f"compiled kernels: {count} and {len(ours)} structures and limits; {', '.join(differ)}")
    for name, (result, *parameters) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, parameters
