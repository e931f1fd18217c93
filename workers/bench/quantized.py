"""Products with quantised weights beside those in bfloat16, for a matrix that no cache holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from workers.bench.timing import Figure, measure, median_figure
from workers.model import compiled
from workers.model.compiled import Packed, packed
from workers.model.layers import linear
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


def forms(outputs: int) -> Iterator[tuple[str, Packed]]:
    """Yield the same sizes in bfloat16 and in every layout of quantised weights, packed."""
    yield "bfloat16", packed(torch.zeros(outputs, DEPTH, dtype=torch.bfloat16))
    for name, kind, group, zeros in _FORMS:
        width = DEPTH // 2 if kind == "int4" else DEPTH
        scales = torch.full((outputs, DEPTH // group), 0.01, dtype=torch.float16)
        points = None if zeros is None else torch.full(scales.shape, 7).to(zeros)
        codes = torch.randint(0, 120, (outputs, width), dtype=torch.uint8)
        yield name, pack(QuantizedWeight(kind, group, codes, scales, points))


def run_quantized(tokens: int, repeats: int, outputs: int = OUTPUTS) -> Iterator[Figure]:
    """Measure `[T, 2048] -> outputs` in every form: of one row and four with the bytes read a second, of `tokens`.

    Raises ValueError: there are no compiled kernels.
    """
    if compiled.path() is None:
        raise ValueError("quantized: no compiled kernels on this machine: install a C++ compiler")
    with torch.inference_mode():
        for name, weight in forms(outputs):
            for rows in (1, 4, tokens):
                x = torch.randn(rows, DEPTH).to(torch.bfloat16)
                seconds = measure(lambda x=x, w=weight: linear(x, w), torch.device("cpu"), repeats)  # type: ignore[misc]
                middle = sorted(seconds)[len(seconds) // 2]
                rate = 2.0 * rows * DEPTH * outputs / middle / 1e12
                note = f"{weight.nbytes / middle / 1e9:.1f} GB/s" if rows < tokens else f"{rate:.3g} TFLOP/s"
                yield median_figure(f"product, {name}, {rows} rows", [each * 1e3 for each in seconds], "ms", note)
