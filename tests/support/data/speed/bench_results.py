"""Results of benchmarks as their files have them, with made-up figures; for tests of tables and pictures only."""

from __future__ import annotations

import random
from typing import Any

from cluster.bench.speed.repeats import summarise
from cluster.bench.speed.scaling import add_efficiencies
from cluster.bench.timeline.figures import bubbles, traffic
from cluster.bench.timeline.trace import ChunkTime, as_json

MACHINE = {"processor": "Made-up Processor", "has_amx": False, "cores": 2}


def result(kind: str, rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return a result file of `longreach bench KIND`."""
    return {
        "what": f"bench {kind}", "config": {"max_others": 0.05}, "machine": MACHINE, "complete": True, "rows": rows,
        "model": {"name": "made-up"}, "environment": {"date": "2026-01-02 03:04 UTC", "commit": "abc"}, **more,
    }  # fmt: skip


def row(figure: str, seconds: float, *, disturbed: bool = False, **key: Any) -> dict[str, Any]:
    """Return a row of three repeats around a value."""
    runs = [{figure: seconds * part, "others": 0.2 if disturbed else 0.01, "disturbed": disturbed}
            for part in (0.97, 1.0, 1.05)]  # fmt: skip
    return {"mode": "dense", "stages": 1, "shards": 1, **key, **summarise(runs)}


def prefill() -> dict[str, Any]:
    rows = []
    for mode, power in (("dense", 1.7), ("sparse", 1.15)):
        for length in (4096, 16384, 65536, 131072):
            seconds = 1.2 * (length / 4096) ** power
            chunks = [{"start": at, "length": 4096, "measured_s": 0.3 + at / 1e5, "fitted_s": 0.32 + at / 1.05e5}
                      for at in range(0, length, 4096)]  # fmt: skip
            rows.append(row("first_token_s", seconds, mode=mode, length=length, chunks=chunks,
                            disturbed=(mode, length) == ("sparse", 16384)))  # fmt: skip
    return result("prefill", rows)


def decode() -> dict[str, Any]:
    rows = [row("decode_ms", base + length / 2e3, mode=mode, length=length, tokens=64)
            for mode, base in (("bfloat16", 20), ("int8 KV", 18)) for length in (1024, 4096, 16384, 65536)]  # fmt: skip
    return result("decode", rows)


def chunks(stages: int, shards: int, count: int = 8) -> list[ChunkTime]:
    """Return a timeline in which every chunk takes longer than the one before, and later stages wait a little."""
    ended: dict[int, float] = {}
    found = []
    for stage in range(stages):
        free = 0.0
        for at in range(count):
            came = max(free, ended.get(at, 0.0) + 0.01)
            done = came + 0.5 + 0.1 * at + 0.15 * (stage % 2)
            for rank in range(shards):
                found.append(ChunkTime(stage, rank, at * 2048, 2048, free, came, done, done + 0.002, 4 << 20,
                                       0.05 if shards > 1 else 0.0, (8 << 20) if shards > 1 else 0))  # fmt: skip
            ended[at], free = done, done + 0.002
    return sorted(found, key=lambda chunk: (chunk.stage, chunk.rank, chunk.start))


def scaling() -> dict[str, Any]:
    rows = []
    draw = random.Random(1)
    tokens = [[draw.randrange(500, 1500) for _ in range(64)] for _ in range(8)]
    for stages, shards, seconds in ((1, 1, 60.0), (2, 1, 31.5), (4, 1, 33.0), (1, 2, 33.5)):
        found = chunks(stages, shards)
        of_shards = [[sum(layer[: 64 // shards]), sum(layer[64 // shards :])][:shards] for layer in tokens]
        experts = {"layers": list(range(8)), "tokens": tokens, "shards": of_shards,
                   "imbalance": [max(one) * shards / sum(one) for one in of_shards]}  # fmt: skip
        rows.append(row("first_token_s", seconds, kind="strong", stages=stages, shards=shards, length=65536,
                        oversubscribed=stages > 2, timeline=as_json(found), bubbles=bubbles(found),
                        traffic=traffic(found), experts=experts))  # fmt: skip
    for stages, length, seconds in ((1, 65536, 60.0), (1, 131072, 160.0), (2, 131072, 83.0)):
        rows.append(row("first_token_s", seconds, kind="weak", stages=stages, length=length))
    rows += [row("tokens_per_s", 900.0 + 200 * jobs, kind="throughput", length=4096, tokens=64, jobs=jobs)
             for jobs in (1, 2, 4)]  # fmt: skip
    add_efficiencies(rows)
    return result("scaling", rows)


def compare() -> dict[str, Any]:
    rows = []
    for length in (4096, 16384):
        for engine, part in (("longreach", 1.2), ("transformers", 2.9)):
            rows.append(row("first_token_s", part * (length / 4096) ** 1.7, engine=engine, length=length))
            rows[-1]["figures"] |= row("decode_ms", 20 * part + length / 1e3)["figures"]
    return result("compare", rows)


def recall() -> dict[str, Any]:
    """Return a result of `longreach eval recall`."""
    draw = random.Random(2)
    density = [[draw.uniform(0.01, 0.2) for _ in range(4)] for _ in range(6)]
    kept = [[1 - 0.01 / value * draw.uniform(0.1, 0.9) for value in layer] for layer in density]
    heads = {"density": density, "held_out_recall": kept}
    return {"what": "recall", "model": "made-up", "tokens": 65536, "variants": [
        {"name": "sparse", "heads": heads}, {"name": "int8 KV"},
    ], "environment": {"date": "2026-01-02 03:04 UTC", "cpu": "Made-up Processor", "cores": 2}}  # fmt: skip
