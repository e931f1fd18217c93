"""Routing on the device: the experts of every token, and entries sorted by expert by counting them.

Nothing returns to the host. An entry is a token with one of its experts.

Legend: `T` tokens, `E` experts of the model, `Er` experts of this shard, `k` experts per token, `N = T * k` entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_TOKENS = 8  # of a program that chooses experts
_SORTED = 128  # entries of a program that sorts, at most
_COMPARED = 1 << 14  # entries times experts of such a program, at most; it has them all in registers
_SCANNED = 1024  # counts that are added at once; the same for any number, which one build serves


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits, chosen, weights, tokens, experts, row_stride, TOP_K: tl.constexpr, PADDED_K: tl.constexpr,
    NORMALISE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: `TOKENS` tokens. The best is taken `k` times; of equal ones that of the lowest id."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, BLOCK)
    each = tl.arange(0, PADDED_K)
    inside = (token < tokens)[:, None] & (e < experts)[None, :]
    at = token[:, None].to(tl.int64) * row_stride + e[None, :]
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where((e < experts)[None, :], x, float("-inf"))
    x = tl.exp(x - tl.max(x, 1)[:, None])
    x = x / tl.sum(x, 1)[:, None]
    # what is not a number is chosen last, as low as what is no expert, which comes after it
    left = tl.where(e[None, :] < experts, tl.where(x == x, x, -1.0), -2.0)
    ids = tl.zeros([TOKENS, PADDED_K], tl.int32)
    kept = tl.zeros([TOKENS, PADDED_K], tl.float32)
    for index in range(TOP_K):
        best = tl.max(left, 1)
        expert = tl.min(tl.where(left == best[:, None], e[None, :], BLOCK), 1)
        is_best = e[None, :] == expert[:, None]
        ids = tl.where(each[None, :] == index, expert[:, None], ids)
        kept = tl.where(each[None, :] == index, tl.sum(tl.where(is_best, x, 0.0), 1)[:, None], kept)
        left = tl.where(is_best, -3.0, left)
    if NORMALISE:
        kept = kept / tl.sum(kept, 1)[:, None]
    to = token[:, None].to(tl.int64) * TOP_K + each[None, :]
    mask = (token < tokens)[:, None] & (each < TOP_K)[None, :]
    tl.store(chosen + to, ids.to(tl.int64), mask=mask)
    tl.store(weights + to, kept, mask=mask)


def route(logits: torch.Tensor, top_k: int, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the `k` experts of every token by their softmax probabilities.

    Args:
        logits: `[T, E]`.
        normalise: divide the kept probabilities by their sum.

    Returns:
        Expert ids `[T, k]` int64, the best first and of equal ones the lowest, and weights `[T, k]` in float32.
    """
    tokens, experts = logits.shape
    assert logits.stride(1) == 1
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        rows = min(_TOKENS, triton.next_power_of_2(tokens))
        route_kernel[(triton.cdiv(tokens, rows),)](
            logits, chosen, weights, tokens, experts, logits.stride(0), TOP_K=top_k,
            PADDED_K=triton.next_power_of_2(top_k), NORMALISE=normalise, TOKENS=rows,
            BLOCK=triton.next_power_of_2(experts), num_warps=1 if rows == 1 else 4,
        )  # fmt: skip
    return chosen, weights


@triton.jit
def _local_experts(chosen, first, experts, program, entries, COUNT: tl.constexpr):
    """Load the experts of `COUNT` entries, counted within the shard; `experts` for those of other shards."""
    entry = program * COUNT + tl.arange(0, COUNT)
    expert = tl.load(chosen + entry, mask=entry < entries, other=-1) - first
    return entry, tl.where((expert >= 0) & (expert < experts) & (entry < entries), expert, experts).to(tl.int32)


@triton.jit(do_not_specialize=["entries", "blocks"])
def count_kernel(chosen, counts, entries, first, experts, blocks, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One program: how many of `COUNT` entries each expert has, into its column of `[Er, blocks]`."""
    block = tl.program_id(0)
    _, expert = _local_experts(chosen, first, experts, block, entries, COUNT)
    e = tl.arange(0, BLOCK)
    count = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(counts + e * blocks + block, count, mask=e < experts)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(counts, totals, blocks, SCANNED: tl.constexpr):
    """One program: replace the counts of one expert by their sums over the blocks before, and write their total."""
    expert = tl.program_id(0)
    total = 0
    for start in range(0, blocks, SCANNED):
        at = start + tl.arange(0, SCANNED)
        count = tl.load(counts + expert * blocks + at, mask=at < blocks, other=0)
        tl.store(counts + expert * blocks + at, total + tl.cumsum(count, 0) - count, mask=at < blocks)
        total += tl.sum(count, 0)
    tl.store(totals + expert, total)


@triton.jit(do_not_specialize=["entries", "blocks"])
def place_kernel(
    chosen, counts, totals, order, places, entries, first, experts, blocks, SINGLE: tl.constexpr, COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the places of `COUNT` entries in stable order. With `SINGLE` it is the only one, and counts too."""
    block = tl.program_id(0)
    entry, expert = _local_experts(chosen, first, experts, block, entries, COUNT)
    e, other = tl.arange(0, BLOCK), tl.arange(0, COUNT)
    _, same = _local_experts(chosen, first, experts, block, entries, COUNT)
    before = (expert[:, None] == same[None, :]) & (other[None, :] < tl.arange(0, COUNT)[:, None])
    place = tl.sum(before.to(tl.int32), 1)
    if SINGLE:
        total = tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
        tl.store(totals + e, total, mask=e < experts)
    else:
        total = tl.load(totals + e, mask=e < experts, other=0)
        place += tl.load(counts + expert * blocks + block, mask=expert < experts, other=0)
    place += tl.sum(tl.where(e[None, :] < tl.minimum(expert, experts)[:, None], total[None, :], 0), 1)
    is_local = expert < experts
    tl.store(order + place, entry, mask=is_local)
    tl.store(places + entry, tl.where(is_local, place, -1), mask=entry < entries)


@dataclass(frozen=True, slots=True)
class Sorted:
    """Entries in the order of their experts, and by their own number before that."""

    order: torch.Tensor  # [N] int32, the entry of every place; unspecified from the sum of `totals` on
    places: torch.Tensor  # [N] int32, the place of every entry; -1 for experts of other shards
    totals: torch.Tensor  # [Er] int32, the number of entries of every expert


def sort_entries(chosen: torch.Tensor, first: int, experts: int) -> Sorted:
    """Sort the entries of `chosen` `[T, k]` by expert, of which this shard has `first .. first + experts - 1`."""
    entries, device = chosen.numel(), chosen.device
    flat = chosen.reshape(-1)
    order, places = torch.empty(2, entries, dtype=torch.int32, device=device)
    totals = torch.empty(experts, dtype=torch.int32, device=device)
    size = triton.next_power_of_2(experts)
    count = min(_SORTED, max(16, _COMPARED // size), triton.next_power_of_2(max(1, entries)))
    blocks = max(1, triton.cdiv(entries, count))
    counts = totals
    if blocks > 1:
        counts = torch.empty(experts, blocks, dtype=torch.int32, device=device)
        count_kernel[(blocks,)](flat, counts, entries, first, experts, blocks, COUNT=count, BLOCK=size)
        scan_kernel[(experts,)](counts, totals, blocks, SCANNED=_SCANNED)
    place_kernel[(blocks,)](
        flat, counts, totals, order, places, entries, first, experts, blocks, SINGLE=blocks == 1, COUNT=count,
        BLOCK=size, num_warps=8,
    )  # fmt: skip
    return Sorted(order, places, totals)
