"""Mixture of experts: route, sort tokens by expert, grouped matrix products, combine.

Legend: `T` tokens, `M` hidden size, `I` expert intermediate, `E` experts of the model, `Er` experts of this shard,
`k` experts a token uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from protos.stage.messages import Span
from workers.model import compiled
from workers.model.layers import linear, swiglu

_STEP_TOKENS = 4096  # of the compiled kernel: more would not lower the share of reading the weights by much


def route(x: torch.Tensor, router: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` experts of every token and their weights.

    Args:
        x: `[T, M]`.
        router: `[E, M]`, or packed.
        normalise: divide the kept probabilities by their sum (config key `norm_topk_prob`).

    Returns:
        Expert ids `[T, k]` and weights `[T, k]` in float32.
    """
    logits = linear(x, router)
    if compiled.routes(logits):
        return compiled.route(logits, top_k, normalise)
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, experts = probabilities.topk(top_k, dim=-1)
    if normalise:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts, weights


class ExpertScratch:
    """The rows that experts write, kept between layers and steps: fresh pages cost more than the sum over them."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def rows(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """`[count, M]` in the type and on the device of `like` `[T, M]`, of unspecified content."""
        buffer = self._buffer
        same = buffer is not None and (buffer.dtype, buffer.device) == (like.dtype, like.device)
        if buffer is None or not same or buffer.shape[0] < count or buffer.shape[1] != like.shape[1]:
            buffer = self._buffer = like.new_zeros(count, like.shape[1])
        return buffer[:count]


def run_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span, scratch: ExpertScratch | None = None,
) -> torch.Tensor:  # fmt: skip
    """Weighted sum of this shard's experts; tokens without a local expert get zeros.

    Args:
        x: `[T, M]`.
        experts, weights: `[T, k]` from `route`.
        gate_up: `[Er, 2 I, M]`; down: `[Er, M, I]`; both plain or both packed (`compiled`).
        local: global ids of the shard's experts.
        scratch: memory kept between calls.

    Returns:
        `[T, M]`, this shard's partial sum, in memory of its own.
    """
    tokens, top_k = experts.shape
    if down.dim() > 3:
        return _packed_experts(x, experts, weights, gate_up, down, local, scratch or ExpertScratch())
    if tokens == 1 and x.device.type == "cpu":
        return _one_token(x, experts, weights, gate_up, down, local)
    flat = experts.flatten() - local.start
    flat = torch.where((flat >= 0) & (flat < local.size), flat, local.size)  # foreign experts sort behind ours
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=local.size + 1)[: local.size]
    if x.device.type == "cuda" and x.dtype == torch.bfloat16:
        order = order[: int(counts.sum())]
        ends = counts.cumsum(0).to(torch.int32)
        hidden = swiglu(F.grouped_mm(x[order // top_k], gate_up.transpose(1, 2), offs=ends))
        out = F.grouped_mm(hidden.contiguous(), down.transpose(1, 2), offs=ends)
        out = torch.cat([out, out.new_zeros(1, out.shape[1])]) if out.shape[0] < experts.numel() else out
    else:
        sizes = counts.tolist()
        order = order[: sum(sizes)]
        out = _expert_loop(x, order // top_k, sizes, gate_up, down, scratch or ExpertScratch())
    return _combine(out, order, weights)


def _packed_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span, scratch: ExpertScratch,
) -> torch.Tensor:  # fmt: skip
    """The compiled kernel, over some tokens at a time: what their experts write is as large as all their choices."""
    rows = scratch.rows(min(x.shape[0], _STEP_TOKENS) * experts.shape[1], x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, x.shape[0], _STEP_TOKENS):
        part = slice(start, start + _STEP_TOKENS)
        compiled.run_experts(x[part], experts[part], weights[part], gate_up, down, local, rows, out[part])
    return out


def _one_token(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span,
) -> torch.Tensor:  # fmt: skip
    """Decoding: no sorting, one pass over the weights of every chosen expert."""
    slots = [(slot, e - local.start) for slot, e in enumerate(experts[0].tolist()) if local.start <= e < local.stop]
    hidden = x.new_empty(len(slots), gate_up.shape[1])
    out = x.new_zeros(experts.shape[1], x.shape[1])
    for row, (_, expert) in enumerate(slots):
        torch.mv(gate_up[expert], x[0], out=hidden[row])
    hidden = swiglu(hidden)
    for row, (slot, expert) in enumerate(slots):
        torch.mv(down[expert], hidden[row], out=out[slot])
    return weights.to(x.dtype) @ out


def _expert_loop(
    x: torch.Tensor, source: torch.Tensor, sizes: list[int], gate_up: torch.Tensor, down: torch.Tensor,
    scratch: ExpertScratch,
) -> torch.Tensor:  # fmt: skip
    """Gated MLP of each expert on its rows: `source` `[n]` names the token of every row, sorted by expert.

    The matrix library compiles a kernel for every new row count (2 to 5 ms), so counts are rounded up. The rows past
    an expert's own belong to those after it, which overwrite them in turn; only the last ones need room of their own.

    Returns:
        `[more than n, M]`; rows from `n` on are meaningless, but for the last one, which is zero.
    """
    padded = [_round_up(size) for size in sizes]
    room = source.shape[0] + max(wide - size for wide, size in zip(padded, sizes, strict=True))
    source = F.pad(source, (0, room - source.shape[0]))
    out = scratch.rows(room + 1, x)
    out[room] = 0
    gathered = x.new_empty(max(padded), x.shape[1])
    hidden = x.new_empty(max(padded), gate_up.shape[1])
    start = 0
    for expert, (size, wide) in enumerate(zip(sizes, padded, strict=True)):
        if size:
            rows = torch.index_select(x, 0, source[start : start + wide], out=gathered[:wide])
            torch.mm(rows, gate_up[expert].t(), out=hidden[:wide])
            torch.mm(swiglu(hidden[:wide]), down[expert].t(), out=out[start : start + wide])
        start += size
    return out


def _round_up(count: int) -> int:
    """The next size of a short list: multiples of 8 below 64, then eight sizes an octave (at most 1/8 more rows)."""
    step = max(8, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _combine(out: torch.Tensor, order: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sum of the rows that belong to one token, accumulated in float32.

    Args:
        out: `[n or more, M]`, row `i` for the slot `order[i]` of the flattened `[T, k]`; the last row is zero when
            other shards serve some slots.
        order: `[n]`.
        weights: `[T, k]` float32.
    """
    place = torch.full((weights.numel(),), out.shape[0] - 1, dtype=torch.int64, device=out.device)
    place[order] = torch.arange(order.shape[0], device=out.device)
    # a bag of rows per token: gathers, weighs and adds in one pass, without the [T * k, M] copy
    return F.embedding_bag(place.view_as(weights), out, mode="sum", per_sample_weights=weights.to(out.dtype))


def run_experts_reference(
    x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor,
    local: Span,
) -> torch.Tensor:  # fmt: skip
    """Slow twin of `run_experts`: one token and one expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for token in range(x.shape[0]):
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            if local.start <= expert < local.stop:
                gate, up = (gate_up[expert - local.start].float() @ x[token].float()).chunk(2)
                out[token] += weight * (down[expert - local.start].float() @ (F.silu(gate) * up))
    return out.to(x.dtype)
