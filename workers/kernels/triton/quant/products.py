"""Products with quantised weights: of a dense matrix, and of experts whose rows are gathered.

A tile of weights is unpacked where it is used: 4- and 8-bit codes become `scale * (code - zero)`, rounded to the type
of the activations as `QuantizedWeight.dequantize` rounds. Where activations are in e4m3 too (`rows.ScaledRows`), both
sides stay codes: the product of 128 inputs is summed by itself, and added in float32 with the scales of its row and
column.

Legend: `T` tokens, `K` inputs, `N` outputs, `Er` experts of this shard, `G` groups of inputs, `k` experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from workers.kernels.triton.layer.experts import Tiling, combine, expert_tile
from workers.kernels.triton.layer.routing import Sorted, sort_entries
from workers.kernels.triton.layer.rows import INTERPRETED, dot_type
from workers.kernels.triton.quant.rows import GROUP, ScaledRows, quantise_rows

if TYPE_CHECKING:
    from workers.quant.weight import QuantizedWeight

ADA = (8, 9)  # compute capability from which products of e4m3 exist
_MIN_STEP = 16  # inputs that a product takes at least
_FEW_ROWS, _SOME_ROWS = 16, 96  # of a matrix in the mean, up to which tiles are narrow, and half as wide


def choose_tiling(rows: float, scaled: bool, gated: bool, capability: tuple[int, int]) -> Tiling:
    """Choose by the mean rows of a matrix; `scaled`: both sides are codes, whose step is a group of 128.

    On 10.x a thread has all columns of a row, and so the scales of all: wider tiles of codes spill.
    """
    if INTERPRETED:
        return Tiling(16, 32, GROUP if scaled else 32, 4, 2)
    if rows <= _FEW_ROWS:
        return Tiling(16, 32 if gated else 64, 128, 4, 4)
    if scaled and capability[0] == 10:
        return Tiling(64, 64, GROUP, 8, 3)
    if rows <= _SOME_ROWS:
        return Tiling(64, 64, 128 if scaled else 64, 4, 3)
    return Tiling(128, 64 if gated else 128, 128 if scaled else 64, 8, 3)


@triton.jit
def _e4m3_values(codes):
    """Return e4m3 codes as float32 by their bits, as GPUs before 8.9 do not know the type."""
    wide = codes.to(tl.int32)
    bits = ((wide & 0x7F) << 20) | ((wide & 0x80) << 24)
    values = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120: exponents of 7 become those of 127
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), values)


@triton.jit
def _weight_tile(
    codes, scales, zeros, c, depth, DEPTH: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, KIND: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return weights `[columns, STEP]` in float32 of outputs `c` and inputs from `depth` on, all of one group."""
    known = (c < WIDTH)[:, None]
    if KIND == "int4":
        at = tl.arange(0, STEP // 2)
        packed = tl.load(
            codes + c[:, None].to(tl.int64) * (DEPTH // 2) + (depth // 2 + at)[None, :],
            mask=known & (depth + 2 * at < DEPTH)[None, :], other=0,
        )  # fmt: skip
        values = tl.interleave(packed & 15, packed >> 4).to(tl.float32)
    else:
        at = tl.arange(0, STEP)
        stored = tl.load(
            codes + c[:, None].to(tl.int64) * DEPTH + (depth + at)[None, :],
            mask=known & (depth + at < DEPTH)[None, :], other=0,
        )  # fmt: skip
        values = stored.to(tl.int8, bitcast=True).to(tl.float32) if KIND == "int8" else _e4m3_values(stored)
    place = c.to(tl.int64) * GROUPS + depth // GROUP_SIZE
    scale = tl.load(scales + place, mask=c < WIDTH, other=0.0).to(tl.float32)
    if zeros is not None:
        zero = tl.load(zeros + place, mask=c < WIDTH, other=0).to(tl.float32)
        values = values - zero[:, None]
    elif KIND == "int4":
        values = values - 8.0
    return values * scale[:, None]


@triton.jit
def _scaled_step(
    total, part, row_scale, codes, scales, c, depth, DEPTH: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Add the product of codes `part` `[rows, STEP]` with those of outputs `c`, under the scales of both."""
    at = depth + tl.arange(0, STEP)
    matrix = codes + c[:, None].to(tl.int64) * DEPTH + at[None, :]
    weight = tl.load(matrix, mask=(c < WIDTH)[:, None] & (at < DEPTH)[None, :], other=0.0).to(DOT)
    place = c.to(tl.int64) * GROUPS + depth // GROUP_SIZE
    scale = tl.load(scales + place, mask=c < WIDTH, other=0.0).to(tl.float32)
    return total + tl.dot(part, tl.trans(weight), input_precision="ieee") * (row_scale[:, None] * scale[None, :])


@triton.jit(do_not_specialize=["tokens"])
def quantised_product_kernel(
    x, x_scales, codes, scales, zeros, inputs, bias, order, totals, out, tokens, experts, x_stride,
    TOP_K: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: `COLUMNS` columns of a tile of rows of one matrix.

    Without `totals` there is one matrix `[N, K]`, and rows are tokens; else those `[Er, N, K]` of experts, and rows lie
    in the order of places. With `GATED` rows are gathered from tokens by `order`, and the result is `silu(gate) * up`
    of matrices `[Er, 2 N, K]`. `DEPTH` and `WIDTH` are `K` and `N`. With `x_scales` both sides are codes in e4m3, and
    `STEP` is 128. `inputs` `[Er, K]` is the input of every column, where they have an order of their own.
    """
    if totals is not None:
        expert, start, rows = expert_tile(totals, tl.program_id(1), experts, ROWS, BLOCK)
    else:
        expert, start = tl.program_id(1) * 0, tl.program_id(1) * ROWS
        rows = tl.minimum(ROWS, tokens - start)
    if rows > 0:
        r, s = tl.arange(0, ROWS), tl.arange(0, STEP)
        c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        row = start + r
        if GATED:
            row = tl.load(order + row, mask=r < rows, other=0) // TOP_K
        source = x + row[:, None].to(tl.int64) * x_stride
        first = expert.to(tl.int64) * (2 * WIDTH if GATED else WIDTH)  # output of all matrices
        codes += first * (DEPTH // 2 if KIND == "int4" else DEPTH)
        scales += first * GROUPS
        if zeros is not None:
            zeros += first * GROUPS
        up_codes = codes + WIDTH * (DEPTH // 2 if KIND == "int4" else DEPTH)
        up_scales = scales + WIDTH * GROUPS
        up_zeros = zeros
        if zeros is not None:
            up_zeros = zeros + WIDTH * GROUPS
        main = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for depth in range(0, DEPTH, STEP):
            at = depth + s
            inside = (r < rows)[:, None] & (at < DEPTH)[None, :]
            if inputs is not None:
                at = tl.load(inputs + expert.to(tl.int64) * DEPTH + at, mask=at < DEPTH, other=0)
            part = tl.load(source + at[None, :], mask=inside, other=0.0).to(DOT)
            if x_scales is not None:
                place = row.to(tl.int64) * ((DEPTH + STEP - 1) // STEP) + depth // STEP
                row_scale = tl.load(x_scales + place, mask=r < rows, other=0.0)
                main = _scaled_step(
                    main, part, row_scale, codes, scales, c, depth, DEPTH, WIDTH, GROUPS, GROUP_SIZE, STEP, DOT
                )
                if GATED:
                    up = _scaled_step(
                        up, part, row_scale, up_codes, up_scales, c, depth, DEPTH, WIDTH, GROUPS, GROUP_SIZE, STEP, DOT
                    )
            else:
                tile = _weight_tile(codes, scales, zeros, c, depth, DEPTH, WIDTH, GROUPS, GROUP_SIZE, KIND, STEP)
                main = tl.dot(part, tl.trans(tile.to(DOT)), main, input_precision="ieee")
                if GATED:
                    tile = _weight_tile(
                        up_codes, up_scales, up_zeros, c, depth, DEPTH, WIDTH, GROUPS, GROUP_SIZE, KIND, STEP
                    )
                    up = tl.dot(part, tl.trans(tile.to(DOT)), up, input_precision="ieee")
        if GATED:
            main = main * tl.sigmoid(main) * up
        if bias is not None:
            main += tl.load(bias + c, mask=c < WIDTH, other=0.0).to(tl.float32)[None, :]
        to = out + (start + r)[:, None].to(tl.int64) * WIDTH + c[None, :]
        tl.store(to, main.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (c < WIDTH)[None, :])


def group_step(weight: QuantizedWeight) -> int:
    """Return the largest power of two that divides the groups of a weight, at most 128: of inputs of one scale."""
    depth = weight.shape[-1]
    return GROUP if weight.group >= depth else min(GROUP, weight.group & -weight.group)


def takes(weight: QuantizedWeight) -> bool:
    """Return whether the kernels read a weight: its groups begin at multiples of 16 inputs."""
    return group_step(weight) >= _MIN_STEP


def is_scaled(weight: QuantizedWeight, capability: tuple[int, int]) -> bool:
    """Return whether activations are quantised too: for e4m3 in groups of whole 128 inputs, where GPUs multiply it."""
    return capability >= ADA and weight.kind == "float8_e4m3" and weight.order is None and group_step(weight) == GROUP


def linear(
    x: torch.Tensor, weight: QuantizedWeight, bias: torch.Tensor | None, capability: tuple[int, int],
    tiling: Tiling | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute `x @ weight.T + bias` for `[T, K]`, unit stride in `K`, and `[N, K]`: summed in float32, rounded once."""
    tokens, outputs = x.shape[0], weight.shape[0]
    rows: torch.Tensor | ScaledRows = quantise_rows(x) if is_scaled(weight, capability) else x
    tiling = tiling or choose_tiling(tokens, isinstance(rows, ScaledRows), False, capability)
    out = x.new_empty(tokens, outputs)
    if tokens:
        _launch(rows, weight, out, tiling, bias=bias)
    return out


def run_experts(
    x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, gate_up: QuantizedWeight, down: QuantizedWeight,
    first: int, capability: tuple[int, int], tilings: tuple[Tiling, Tiling] | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute `layer.experts.run_experts` with quantised `gate_up` `[Er, 2 I, M]` and `down` `[Er, M, I]`.

    The output of the first product is rounded to the type of `x`, and quantised where the second takes codes.
    """
    tokens, top_k = chosen.shape
    experts, width, inter = down.shape
    out = x.new_empty(tokens, width)
    if not tokens:
        return out
    by_expert, entries = sort_entries(chosen, first, experts), tokens * top_k
    hidden, rows = x.new_empty(entries, inter), x.new_empty(entries, width)
    mean = entries / max(1, min(entries, experts))
    for source, weight, target, gated in ((x, gate_up, hidden, True), (hidden, down, rows, False)):
        scaled = is_scaled(weight, capability)
        read = quantise_rows(source) if scaled else source
        tiling = tilings[0 if gated else 1] if tilings else choose_tiling(mean, scaled, gated, capability)
        _launch(read, weight, target, tiling, by_expert=by_expert, top_k=top_k, gated=gated)
    combine(rows, by_expert, weights, out)
    return out


def _launch(
    x: torch.Tensor | ScaledRows, weight: QuantizedWeight, out: torch.Tensor, tiling: Tiling, *,
    bias: torch.Tensor | None = None, by_expert: Sorted | None = None, top_k: int = 1, gated: bool = False,
) -> None:  # fmt: skip
    """Start the product of rows with a matrix, or with those of experts, into `out` `[rows, N]`, contiguous."""
    entries, width = out.shape
    experts, depth = (weight.shape[0] if by_expert else 1), weight.shape[-1]
    values, x_scales = x if isinstance(x, ScaledRows) else (x, None)
    codes = weight.codes.view(torch.float8_e4m3fn) if x_scales is not None else weight.codes
    assert values.stride(1) == 1
    assert all(part.is_contiguous() for part in (weight.codes, weight.scales))
    step = min(tiling.step, group_step(weight), max(_MIN_STEP, triton.next_power_of_2(depth)))
    tiles = triton.cdiv(entries, tiling.rows)
    if by_expert:
        tiles = min(entries, entries // tiling.rows + experts)  # an expert has at most one that is not full
    operand = values.dtype if x_scales is None or INTERPRETED else None
    quantised_product_kernel[(triton.cdiv(width, tiling.columns), tiles)](
        values, x_scales, codes, weight.scales, weight.zeros, weight.order, bias,
        by_expert.order if by_expert else None, by_expert.totals if by_expert else None, out, entries, experts,
        values.stride(0), TOP_K=top_k, DEPTH=depth, WIDTH=width, GROUPS=weight.scales.shape[-1],
        GROUP_SIZE=weight.group, KIND=weight.kind, GATED=gated, ROWS=tiling.rows, COLUMNS=tiling.columns, STEP=step,
        BLOCK=triton.next_power_of_2(experts), DOT=tl.float8e4nv if operand is None else dot_type(operand),
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
