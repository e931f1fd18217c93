"""Row operations, one kernel each: residual and norm, SwiGLU; and the type of the operands of products.

Legend: `T` tokens, `M` hidden size, `I` intermediate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
_DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_SWIGLU_BLOCK = 1024


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type of the operands of products for activations of `dtype`.

    The interpreter of Triton multiplies bfloat16 wrongly, so there it is float32.
    """
    return tl.float32 if INTERPRETED else _DOT_TYPES[dtype]


@triton.jit
def add_rms_norm_kernel(x, delta, weight, normed, x_stride, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """One program: one row. With `ADD`, `x + delta` is written to `delta`, and it is that which is normalised."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < width
    wide = tl.load(x + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(delta + row * width + d, mask=inside, other=0.0).to(tl.float32)
        total = wide.to(delta.dtype.element_ty)
        tl.store(delta + row * width + d, total, mask=inside)
        wide = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    out = wide * inverse * tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * width + d, out.to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + delta` and its root mean square norm, `[T, M]` each, rounded once each.

    Args:
        x: `[T, M]`, rows of any stride.
        delta: `[T, M]`, contiguous, overwritten with the sum; None to normalise `x` alone.
        weight: `[M]`.
    """
    rows, width = x.shape
    assert x.stride(1) == 1
    assert delta is None or delta.is_contiguous()
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = triton.next_power_of_2(width)
    if rows:
        add_rms_norm_kernel[(rows,)](
            x, normed if delta is None else delta, weight, normed, x.stride(0), width, eps, ADD=delta is not None,
            BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return x if delta is None else delta, normed


@triton.jit
def swiglu_kernel(gate_up, out, width, row_stride, BLOCK: tl.constexpr):
    """One program: `BLOCK` columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < width
    gate = tl.load(gate_up + row * row_stride + d, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * row_stride + width + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + d, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up`, `[T, I]`, of `[T, 2 I]` that holds gate, then up; rounded once."""
    rows, both = gate_up.shape
    assert gate_up.stride(1) == 1
    width = both // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        block = min(_SWIGLU_BLOCK, triton.next_power_of_2(width))
        swiglu_kernel[(rows, triton.cdiv(width, block))](gate_up, out, width, gate_up.stride(0), BLOCK=block)
    return out
