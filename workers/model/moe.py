"""Mixture of experts: route, sort tokens by expert, grouped matrix products, combine.

Legend: `T` tokens, `M` hidden size, `I` expert intermediate, `E` experts of the model, `Er` experts of this shard,
`k` experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from protos.stage.messages import Span
from workers.kernels.triton.layer import calls
from workers.kernels.triton.quant import calls as quantised
from workers.model import compiled
from workers.model.layers import linear, swiglu
from workers.quant.packed import Experts
from workers.quant.weight import QuantizedWeight, plain

_STEP_TOKENS = 4096  # of one call of the compiled kernel; more would hardly read the weights less often


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `k` experts of every token.

    Args:
        x: `[T, M]`.
        router: `[E, M]`, or packed.
        normalise: divide the kept probabilities by their sum (config key `norm_topk_prob`).

    Returns:
        Expert ids `[T, k]` and weights `[T, k]` in float32.
    """
    logits = linear(x, router)
    if compiled.supports_route(logits):
        return compiled.route(logits, top_k, normalise)
    if calls.supports(logits.device):
        return calls.route(logits, top_k, normalise)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, experts = probabilities.topk(top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights


class ExpertScratch:
    """The output rows of experts, kept between layers and steps: page faults of fresh memory cost more than the sum."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def rows(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Return `[count, M]` of unspecified content in the type and on the device of `like` `[T, M]`."""
        kind, buffer = (like.dtype, like.device, like.shape[1]), self._buffer
        if buffer is None or (buffer.dtype, buffer.device, buffer.shape[1]) != kind or buffer.shape[0] < count:
            buffer = self._buffer = like.new_zeros(count, like.shape[1])
        return buffer[:count]


def stays_on_device(x: torch.Tensor, gate_up: Experts, down: Experts) -> bool:
    """Return whether `run_experts` never has the host wait for a device: kernels multiply rows like `x` with both."""
    if isinstance(gate_up, QuantizedWeight) and isinstance(down, QuantizedWeight):
        return quantised.supports(x, gate_up, down)
    return isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor) and calls.supports(x.device)


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: Experts, down: Experts,
    local: Span, scratch: ExpertScratch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Compute the weighted sum of this shard's experts; tokens without a local expert get zeros.

    Args:
        x: `[T, M]`.
        experts, weights: `[T, k]` from `route`.
        gate_up: `[Er, 2 I, M]`; down: `[Er, M, I]`; both packed (`compiled`), or each plain or quantised.
        local: global ids of the shard's experts.
        scratch: memory kept between calls.

    Returns:
        `[T, M]`, this shard's partial sum, in memory of its own.
    """
    tokens, top_k = experts.shape
    if compiled.is_packed(gate_up) and compiled.is_packed(down) and x.dtype == torch.bfloat16:
        return _packed_experts(x, experts, weights, gate_up, down, local, scratch or ExpertScratch())
    if stays_on_device(x, gate_up, down):
        if isinstance(gate_up, torch.Tensor) and isinstance(down, torch.Tensor):
            return calls.run_experts(x, experts, weights, gate_up, down, local.start)
        assert isinstance(gate_up, QuantizedWeight)
        assert isinstance(down, QuantizedWeight)
        return quantised.run_experts(x, experts, weights, gate_up, down, local.start)
    if tokens == 1 and x.device.type == "cpu":
        return _one_token(x, experts, weights, gate_up, down, local)
    flat = experts.flatten() - local.start
    flat = torch.where((flat >= 0) & (flat < local.size), flat, local.size)  # experts of other shards sort last
    sizes = torch.bincount(flat, minlength=local.size + 1)[: local.size].tolist()
    order = flat.argsort(stable=True)[: sum(sizes)]
    out = _expert_loop(x, order // top_k, sizes, gate_up, down, scratch or ExpertScratch())
    return _combine(out, order, weights)


def _packed_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: compiled.Packed,
    down: compiled.Packed, local: Span, scratch: ExpertScratch,
) -> torch.Tensor:  # fmt: skip
    """Call the compiled kernel on `_STEP_TOKENS` tokens at a time, as its scratch has a row per token and expert."""
    rows = scratch.rows(min(x.shape[0], _STEP_TOKENS) * experts.shape[1], x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, x.shape[0], _STEP_TOKENS):
        part = slice(start, start + _STEP_TOKENS)
        compiled.run_experts(x[part], experts[part], weights[part], gate_up, down, local, rows, out[part])
    return out


def _one_token(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: Experts, down: Experts,
    local: Span,
) -> torch.Tensor:  # fmt: skip
    """Compute one token (decoding): no sorting, one pass over the weights of every chosen expert."""
    slots = [(slot, e - local.start) for slot, e in enumerate(experts[0].tolist()) if local.start <= e < local.stop]
    hidden = x.new_empty(len(slots), gate_up.shape[1])
    out = x.new_zeros(experts.shape[1], x.shape[1])
    for row, (_, expert) in enumerate(slots):
        torch.mv(plain(gate_up[expert], x.dtype), x[0], out=hidden[row])
    hidden = swiglu(hidden)
    for row, (slot, expert) in enumerate(slots):
        torch.mv(plain(down[expert], x.dtype), hidden[row], out=out[slot])
    return weights.to(x.dtype) @ out


def _expert_loop(
    x: torch.Tensor, source: torch.Tensor, sizes: list[int], gate_up: Experts, down: Experts,
    scratch: ExpertScratch,
) -> torch.Tensor:  # fmt: skip
    """Compute the gated MLP of each expert on its rows; `source` `[n]` has the token of every row, sorted by expert.

    The matrix library compiles a kernel for every new row count (2 to 5 ms), so counts are rounded up. The extra rows
    of an expert belong to the experts after it, which overwrite them; only those of the last one need extra memory.

    Returns:
        `[more than n, M]`; rows from `n` on are unspecified, except that the last one is zero.
    """
    padded = [_round_up(size) for size in sizes]
    total = source.shape[0] + max(wide - size for wide, size in zip(padded, sizes, strict=True))
    source = F.pad(source, (0, total - source.shape[0]))
    out = scratch.rows(total + 1, x)
    out[total] = 0
    gathered = x.new_empty(max(padded), x.shape[1])
    hidden = x.new_empty(max(padded), gate_up.shape[1])
    start = 0
    for expert, (size, wide) in enumerate(zip(sizes, padded, strict=True)):
        if size:
            rows = torch.index_select(x, 0, source[start : start + wide], out=gathered[:wide])
            torch.mm(rows, plain(gate_up[expert], x.dtype).t(), out=hidden[:wide])
            torch.mm(swiglu(hidden[:wide]), plain(down[expert], x.dtype).t(), out=out[start : start + wide])
        start += size
    return out


def _round_up(count: int) -> int:
    """Return the next multiple of 8 up to 64, then the next of eight sizes per octave (at most 1/8 more rows)."""
    step = max(8, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _combine(out: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Compute the weighted sum of the rows of each token, accumulated in float32.

    Args:
        out: `[n or more, M]`, row `i` for entry `order[i]` of the flattened `[T, k]`; the last row is zero when other
            shards compute some of these.
        order: `[n]`.
        weights: `[T, k]` float32.
    """
    place = torch.full((weights.numel(),), out.shape[0] - 1, dtype=torch.int64, device=out.device)
    place[order] = torch.arange(order.shape[0], device=out.device)
    # gathers, weights and adds in one pass, without a copy [T * k, M]
    return F.embedding_bag(place.view_as(weights), out, mode="sum", per_sample_weights=weights.to(out.dtype))
