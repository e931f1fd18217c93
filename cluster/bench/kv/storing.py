"""What storing KV costs those who compute: the same prompts on a head that stores and on one that does not."""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.bench.head_process import until
from cluster.bench.kv.rig import Asked, Bounds, DemoHead, Say, difference, follow, rounded
from cluster.client.client import Client
from cluster.client.models import TokenEvent

PREFILL_COST = 0.05  # of its time, at most
DECODE_COST = 0.05  # of a step's time: what two equal runs differ by on a machine with other work
_LAYOUT = (2, 2)
_AFTER = 97  # tokens of an answer
_SHORT = 200  # tokens of the prompt that is decoded beside a long prefill
_WARM_UP = 8192  # tokens
_TOGETHER_S = 0.001  # between tokens of one message


def token_ids(length: int, seed: str) -> list[int]:
    """Return random ids of the demo model, a prompt that no other seed shares."""
    return random.Random(seed).choices(range(5, 4000), k=length)


def prefill(client: Client, ids: Sequence[int], tokens: int = 1, **options: Any) -> Asked:
    """Answer a prompt greedily with so many tokens."""
    return follow(lambda: client.submit(token_ids=ids, max_tokens=tokens, ignore_eos=True, temperature=0.0, **options))


def measure_storing(length: int, repeats: int, folder: Path | None, say: Say) -> dict[str, Any]:
    """Compute prompts in turns on a head that stores and on one that does not; both run all the time.

    Args:
        length: tokens of the prompts.
        folder: on the disk to measure; default: that of temporary files.
    """
    runs: dict[str, list[dict[str, Any]]] = {"storing": [], "not storing": []}
    with (
        tempfile.TemporaryDirectory(prefix="lr-kv-", dir=folder) as name,
        DemoHead(Path(name) / "storing", _LAYOUT, length) as storing,
        DemoHead(Path(name) / "not storing", _LAYOUT, length, is_storing=False) as plain,
    ):
        heads = {"storing": storing, "not storing": plain}
        for head in heads.values():
            with head.client() as client:
                prefill(client, token_ids(min(length, _WARM_UP), "warm up"), _AFTER)
            head.settle()
        for number in range(repeats):
            for what in sorted(heads, reverse=bool(number % 2)):
                runs[what].append(_run(heads[what], length, number))
                say(f"{number + 1} of {repeats}, {what}: first token after {runs[what][-1]['first_token_s']} s")
    return {"length": length, "repeats": repeats, "runs": runs} | judge_storing(runs)


def _run(head: DemoHead, length: int, number: int) -> dict[str, Any]:
    """Compute one prompt and decode after it; then another one, beside which an answer is decoded."""
    before = head.counts()
    with head.client() as client:
        asked = prefill(client, token_ids(length, f"alone {number}"), _AFTER)
        middle = difference(head.counts(), before)
        after = difference(head.settle(), before)
        beside, stored = _decode_beside(head, client, length, number)
    head.settle()
    times = asked.tokens
    return {
        "first_token_s": round(asked.first_token_s, 3),
        "decode_ms": round((times[-1] - times[0]) / (len(times) - 1) * 1e3, 3),
        "beside_prefill_ms": rounded([gap * 1e3 for gap in beside], 2),
        "stored_blocks": int(after["stored blocks"]), "of_them_by_last_token": int(middle["stored blocks"]),
        "stored_beside": stored, "not_stored_blocks": int(after["not_stored blocks"]),
        "stored_mb": round(after["stored bytes"] / 1e6, 2), "store_s": round(after["stored seconds"], 3),
    }  # fmt: skip


def _decode_beside(head: DemoHead, client: Client, length: int, number: int) -> tuple[list[float], int]:
    """Return the seconds between tokens of a short prompt's answer during a long prefill, and the blocks stored then.

    Steps have a token of the one and a chunk of the other.
    """
    before, times, is_over = head.counts(), list[float](), threading.Event()
    short = client.submit(
        token_ids=token_ids(_SHORT, f"short {number}"), max_tokens=length, ignore_eos=True, temperature=0.0
    )

    def decode() -> None:
        for event in short.stream():
            if isinstance(event, TokenEvent) and not is_over.is_set():
                times.append(time.perf_counter())

    thread = threading.Thread(target=decode)
    thread.start()
    until(lambda: times, "a first token of the short prompt")
    began = time.perf_counter()
    long = prefill(client, token_ids(length, f"beside {number}"))
    is_over.set()
    stored = difference(head.counts(), before)["stored blocks"]
    short.cancel()
    thread.join()
    first, last = began + long.reached(1), began + long.first_token_s
    steps = step_times([at for at in times if first - _TOGETHER_S <= at <= last + _TOGETHER_S])
    if not steps:
        raise RuntimeError("no step had a token of the short and a chunk of the long prompt: make that longer")
    return steps, int(stored)


def step_times(times: Sequence[float]) -> list[float]:
    """Return the seconds of the step of each token but those that came first, from when tokens came.

    Tokens of several steps come together: each of these took an equal part.
    """
    steps, since, together = list[float](), None, 0
    for at, following in zip(times, [*times[1:], math.inf], strict=False):
        together += 1
        if following - at > _TOGETHER_S:
            if since is not None:
                steps += [(at - since) / together] * together
            since, together = at, 0
    return steps


def judge_storing(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return what storing costs, as medians over pairs of runs, beside what it may."""
    storing, plain = runs["storing"], runs["not storing"]

    def cost(figure: Callable[[Mapping[str, Any]], float]) -> tuple[float, list[float]]:
        ratios = [figure(mine) / figure(other) for mine, other in zip(storing, plain, strict=True)]
        return statistics.median(ratios) - 1, rounded(ratios, 4)

    bounds, pairs = Bounds(), dict[str, list[float]]()
    for what, figure, bound in (
        ("time of a prefill", lambda run: run["first_token_s"], PREFILL_COST),
        ("a decode step after it", lambda run: run["decode_ms"], DECODE_COST),
        ("a decode step beside it", lambda run: statistics.median(run["beside_prefill_ms"]), DECODE_COST),
        ("the slowest decode step beside it", lambda run: max(run["beside_prefill_ms"]), DECODE_COST),
    ):
        value, pairs[what] = cost(figure)
        bounds.at_most(f"cost of storing: {what}, share", value, bound)
    return {"ratios": pairs} | bounds.to_json()
