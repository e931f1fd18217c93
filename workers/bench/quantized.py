"""Products with quantised weights beside those in bfloat16: of a large matrix, and of the experts of one token."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch

from protos.stage.messages import Span
from workers.bench.timing import Figure, measure, median_figure
from workers.kv.host_memory import advise_huge_pages
from workers.model import compiled
from workers.model.compiled import Packed, packed
from workers.model.layers import linear
from workers.model.moe import run_experts
from workers.quant.packed import pack
from workers.quant.weight import Kind, QuantizedWeight

OUTPUTS, DEPTH = 32768, 2048  # 128 MiB in bfloat16
_FORMS: tuple[tuple[str, Kind, int, torch.dtype | None], ...] = (
    ("int4, groups of 128", "int4", 128, None),  # GPTQ, compressed-tensors
    ("int4, groups of 128 with zero points", "int4", 128, torch.uint8),  # AWQ
    ("int4, groups of 32", "int4", 32, None),  # Q4_0
    ("int4, groups of 32 with zero points", "int4", 32, torch.float16),  # Q4_K
    ("int8, groups of 128", "int8", 128, None),
    ("int8, groups of 32", "int8", 32, None),  # Q8_0
    ("int8, groups of 16", "int8", 16, None),  # Q6_K
    ("FP8, groups of 128", "float8_e4m3", 128, None),
)
_EXPERTS, _TOP_K, _WIDTH = 128, 8, 768  # of Qwen3-30B-A3B, whose hidden size is DEPTH
_EXPERT_BYTES = 1 << 30  # at least: what caches hold is read in no time, and a model's experts are in none
_MATRICES = (((1, 2 * _WIDTH, DEPTH), True), ((1, DEPTH, _WIDTH), False))  # of an expert; gate, then up in the first


def forms(outputs: int) -> Iterator[tuple[str, Packed]]:
    """Yield the same sizes in bfloat16 and in every layout of quantised weights, packed."""
    yield "bfloat16", packed(torch.zeros(outputs, DEPTH, dtype=torch.bfloat16))
    for name, kind, group, zeros in _FORMS:
        yield name, pack(_weight(kind, group, (outputs, DEPTH), zeros))


def _weight(kind: Kind, group: int, shape: tuple[int, ...], zeros: torch.dtype | None = None) -> QuantizedWeight:
    *leading, depth = shape
    scales = torch.full((*leading, depth // group), 0.01, dtype=torch.float16)
    points = None if zeros is None else torch.full(scales.shape, 7).to(zeros)
    codes = torch.randint(0, 120, (*leading, depth // 2 if kind == "int4" else depth), dtype=torch.uint8)
    return QuantizedWeight(kind, group, codes, scales, points)


def _check_kernels() -> None:
    if compiled.path() is None:
        raise ValueError("quantized: no compiled kernels on this machine: install a C++ compiler")


def run_quantized(tokens: int, repeats: int, outputs: int = OUTPUTS) -> Iterator[Figure]:
    """Measure `[T, 2048] -> outputs` in every form: of one row and four with the bytes read a second, of `tokens`.

    Raises ValueError: there are no compiled kernels.
    """
    _check_kernels()
    with torch.inference_mode():
        for name, weight in forms(outputs):
            for rows in (1, 4, tokens):
                x = torch.randn(rows, DEPTH).to(torch.bfloat16)
                seconds = measure(lambda x=x, w=weight: linear(x, w), torch.device("cpu"), repeats)  # type: ignore[misc]
                middle = sorted(seconds)[len(seconds) // 2]
                rate = 2.0 * rows * DEPTH * outputs / middle / 1e12
                note = f"{weight.nbytes / middle / 1e9:.1f} GB/s" if rows < tokens else f"{rate:.3g} TFLOP/s"
                yield median_figure(f"product, {name}, {rows} rows", [each * 1e3 for each in seconds], "ms", note)


def run_experts_of_a_token(repeats: int, experts: int = _EXPERTS, least_bytes: int = _EXPERT_BYTES) -> Iterator[Figure]:
    """Measure the experts of one token, other ones each time, out of more than caches hold, as steps that decode do.

    Raises ValueError: there are no compiled kernels.
    """
    _check_kernels()
    weights: dict[str, list[Packed]] = {
        "bfloat16": [packed(torch.zeros(shape, dtype=torch.bfloat16), pairs) for shape, pairs in _MATRICES]
    }
    kinds: tuple[Kind, ...] = ("int4", "int8", "float8_e4m3")
    for kind in kinds:
        weights[f"{kind}, groups of 128"] = [pack(_weight(kind, 128, shape), pairs) for shape, pairs in _MATRICES]
    x, scores = torch.randn(1, DEPTH).to(torch.bfloat16), torch.full((1, _TOP_K), 1 / _TOP_K)
    for name, one in weights.items():
        bytes_of_one = sum(weight.nbytes for weight in one)
        count = -(-least_bytes // (bytes_of_one * experts))
        turns = itertools.cycle([[_times(weight, experts) for weight in one] for _ in range(count)])

        def call(turns: Iterator[list[Packed]] = turns) -> None:
            gate_up, down = next(turns)
            run_experts(x, torch.randperm(experts)[None, :_TOP_K], scores, gate_up, down, Span(0, experts))

        with torch.inference_mode():
            seconds = measure(call, torch.device("cpu"), 4 * repeats)
        note = f"{_TOP_K * bytes_of_one / sorted(seconds)[len(seconds) // 2] / 1e9:.1f} GB/s"
        title = f"{_TOP_K} of {experts} experts, {name}, 1 row"
        yield median_figure(title, [each * 1e3 for each in seconds], "ms", note)


def _times(weight: Packed, count: int) -> Packed:
    """Return a weight `[1, ...]` so many times, in memory as a model has it: on huge pages."""
    if isinstance(weight, torch.Tensor):
        return _repeated(weight, count)
    zeros = None if weight.zeros is None else _repeated(weight.zeros, count)
    return replace(weight, codes=_repeated(weight.codes, count), scales=_repeated(weight.scales, count), zeros=zeros)


def _repeated(tensor: torch.Tensor, count: int) -> torch.Tensor:
    out = advise_huge_pages(tensor.new_empty((count, *tensor.shape[1:])))
    return out.copy_(tensor.expand(count, *tensor.shape[1:]))
