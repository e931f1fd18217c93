"""What a timeline of chunks over shards says: bubbles, the cost of links and reductions, the load of experts."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cluster.bench.timeline.trace import ChunkTime
from protos.stage.messages import ShardSpec, StepResult


def by_shard(chunks: Iterable[ChunkTime]) -> dict[tuple[int, int], list[ChunkTime]]:
    """Return the chunks of each (stage, rank) in the order of their positions."""
    shards: dict[tuple[int, int], list[ChunkTime]] = {}
    for chunk in chunks:
        shards.setdefault((chunk.stage, chunk.rank), []).append(chunk)
    return dict(sorted(shards.items()))


def bubbles(chunks: Sequence[ChunkTime]) -> dict[str, Any]:
    """Return the idle share of every shard, and of all together.

    `share` is idle time between a shard's first and last chunk over that time; `with_fill` counts the time before its
    first and after its last chunk too, from the beginning of the first stage to the end of the last one.
    """
    shards = by_shard(chunks)
    if not shards:
        return {}
    begin = min(chunk.input_s for chunk in chunks)
    whole = max(chunk.ended_s for chunk in chunks) - begin
    rows, idle, windows, busy_of_all = [], 0.0, 0.0, 0.0
    for (stage, rank), own in shards.items():
        window = own[-1].ended_s - own[0].input_s
        busy = sum(chunk.busy_s for chunk in own)
        share = (window - busy) / window if window else 0.0
        rows.append({"stage": stage, "rank": rank, "busy_s": round(busy, 4), "window_s": round(window, 4),
                     "share": round(share, 4)})  # fmt: skip
        idle, windows, busy_of_all = idle + window - busy, windows + window, busy_of_all + busy
    return {
        "shards": rows,
        "share": round(idle / windows, 4) if windows else 0.0,
        "with_fill": round(1 - busy_of_all / (whole * len(shards)), 4) if whole else 0.0,
    }


def traffic(chunks: Sequence[ChunkTime]) -> dict[str, Any]:
    """Return what links and reductions cost a chunk: medians in milliseconds, MiB, and shares of the busy time.

    `send_ms` is how long the sender is kept; `hop_ms` is the time from the end of a chunk at one stage until the next
    one, which was waiting, has it. A reduction also waits for the slowest shard, so the smallest of the shards is
    closest to what it costs by itself.
    """
    shards = by_shard(chunks)
    links = [chunk for chunk in chunks if chunk.sent_bytes and chunk.length > 1]
    last = max((stage for stage, _ in shards), default=0)
    hidden = [chunk for chunk in links if chunk.stage < last]
    after = {(chunk.stage, chunk.rank, chunk.start): chunk for chunk in chunks}
    hops = []
    for chunk in hidden:
        following = after.get((chunk.stage + 1, chunk.rank, chunk.start))
        if following is not None and following.began_s < chunk.ended_s:  # it waited
            hops.append(following.input_s - chunk.ended_s)
    out: dict[str, Any] = {}
    if hidden:
        out["link"] = {
            "mib": _mib(hidden, "sent_bytes"), "send_ms": _ms([chunk.sent_s - chunk.ended_s for chunk in hidden]),
            "hop_ms": _ms(hops), "send_share": _share(hidden, [chunk.sent_s - chunk.ended_s for chunk in hidden]),
        }  # fmt: skip
    reduced = [chunk for chunk in chunks if chunk.reduce_bytes]
    if reduced:
        least: dict[tuple[int, int], float] = {}
        for chunk in reduced:
            at = chunk.stage, chunk.start
            least[at] = min(least.get(at, chunk.reduce_s), chunk.reduce_s)
        out["all_reduce"] = {
            "mib": _mib(reduced, "reduce_bytes"), "ms": _ms([chunk.reduce_s for chunk in reduced]),
            "least_ms": _ms(list(least.values())), "share": _share(reduced, [chunk.reduce_s for chunk in reduced]),
        }  # fmt: skip
    return out


def expert_load(results: Iterable[StepResult], shards: Sequence[ShardSpec]) -> dict[str, Any]:
    """Return the tokens of every expert by layer, and what each shard of a stage gets of them; {} without experts.

    `imbalance` is, by layer, the tokens of the busiest shard over the mean of all shards.
    """
    tokens: dict[int, list[int]] = {}
    for result in results:
        for layer in result.trace.experts if result.trace is not None else ():
            known = tokens.setdefault(layer.layer, [0] * len(layer.tokens))
            tokens[layer.layer] = [a + b for a, b in zip(known, layer.tokens, strict=True)]
    if not tokens:
        return {}
    layers = sorted(tokens)
    spans = sorted({(shard.rank, shard.experts) for shard in shards if shard.stage == 0})
    of_shards = [[sum(tokens[layer][span.start : span.stop]) for _, span in spans] for layer in layers]
    return {
        "layers": layers,
        "tokens": [tokens[layer] for layer in layers],
        "shards": of_shards,
        "imbalance": [round(max(row) * len(row) / max(1, sum(row)), 4) for row in of_shards],
    }


def _ms(seconds: Sequence[float]) -> float | None:
    return round(statistics.median(seconds) * 1e3, 3) if seconds else None


def _mib(chunks: Sequence[ChunkTime], name: str) -> float:
    return round(float(statistics.median(getattr(chunk, name) for chunk in chunks)) / 2**20, 3)


def _share(chunks: Sequence[ChunkTime], seconds: Sequence[float]) -> float:
    return round(sum(seconds) / max(1e-9, sum(chunk.busy_s for chunk in chunks)), 4)
