"""What a constraint costs a token of an answer: answers with and without one in turns, over a head in its own process.

A constrained answer is slower by the time of its masks, and as none of its tokens is decoded ahead: the stage waits
while the head computes, and the mask travels. A constraint that any text fulfils shows the latter alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from cluster.bench.constraints.cost import RECORD
from cluster.bench.faults.rig import FaultHead
from cluster.client.client import Client
from cluster.client.models import TokenEvent
from cluster.constraints.answer import ConstrainedAnswer
from cluster.constraints.compiler import ConstraintCompiler
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from protos.jobs.constraint import Constraint

_PROMPT = "The code of dark river is"
_ENDLESS = 10_000  # items or words, so that no answer ends before its number of tokens
ANSWERS: dict[str, dict[str, Any] | None] = {
    "unconstrained": None,
    "any_text": {"regex": r"(.|\n)*"},
    "json_schema": {"json": {"type": "array", "items": RECORD, "minItems": _ENDLESS}},
    "regex": {"regex": f"([A-Z][a-z]{{1,20}}( [a-z]{{1,20}}){{0,30}}[.] ){{{_ENDLESS},}}"},
}
Rows = dict[str, dict[str, list[float]]]  # by answer: token_ms and token_cpu_ms of each round, mask_ms of each token


def measure_decoding(head: FaultHead, rounds: int, tokens: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Return milliseconds of a token as the client sees it, of the head's processor and of its mask, by answer.

    Raises:
        RuntimeError: an answer has another number of tokens.
    """
    process = psutil.Process(head.pid)
    rows: Rows = {name: {"token_ms": [], "token_cpu_ms": [], "mask_ms": []} for name in ANSWERS}
    with head.client() as client:
        answers = {name: _answer(client, constraint, tokens)[0] for name, constraint in ANSWERS.items()}  # warms up
        for number in range(rounds):
            for name, constraint in ANSWERS.items():
                before = process.cpu_times()
                _, moments = _answer(client, constraint, tokens)
                after = process.cpu_times()
                used = after.user + after.system - before.user - before.system
                rows[name]["token_ms"].append((moments[-1] - moments[0]) * 1e3 / (tokens - 1))
                rows[name]["token_cpu_ms"].append(used * 1e3 / tokens)
            say(f"round {number + 1} of {rounds}")
    for name, seconds in _mask_seconds(answers).items():
        rows[name]["mask_ms"] = [one * 1e3 for one in seconds]
    return summarize(rows)


def _answer(client: Client, constraint: dict[str, Any] | None, tokens: int) -> tuple[list[int], list[float]]:
    """Return the ids of an answer and when each came."""
    job = client.submit(
        prompt=_PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True, structured_outputs=constraint, attached=True
    )
    ids, moments = [], []
    for event in job.stream():
        if isinstance(event, TokenEvent):
            ids.append(event.token.token_id)
            moments.append(time.perf_counter())
    if len(ids) != tokens:
        raise RuntimeError(f"{constraint}: the answer has {len(ids)} tokens: must have {tokens}")
    return ids, moments


def _mask_seconds(answers: dict[str, list[int]]) -> dict[str, list[float]]:
    """Return the seconds of each mask of constrained answers, computed again in this process."""
    tokenizer = TextTokenizer.open(needle_dir())
    compiler = ConstraintCompiler(tokenizer, tokenizer.vocab_size, sorted(tokenizer.end_ids))
    found = {}
    for name, ids in answers.items():
        if (constraint := ANSWERS[name]) is not None:
            state = ConstrainedAnswer(compiler.begin(Constraint.from_value(constraint)), (), False, None)
            found[name] = [_seconds(state, token) for token in ids]
    return found


def _seconds(state: ConstrainedAnswer, token: int) -> float:
    began = time.perf_counter()
    state.push(token, "answer", "")
    return time.perf_counter() - began


def summarize(rows: Rows) -> dict[str, Any]:
    """Return medians by answer, and what a constraint adds within each round: its masks and the rest of it.

    `lost_decode_ahead_ms` is that rest where any text is allowed: no step runs ahead, and a mask goes with each.
    """
    free = rows["unconstrained"]["token_ms"]
    shown: dict[str, dict[str, float]] = {}
    for name, found in rows.items():
        shown[name] = {
            "token_ms": round(statistics.median(found["token_ms"]), 3),
            "token_cpu_ms": round(statistics.fmean(found["token_cpu_ms"]), 3),
        }
        if name != "unconstrained":
            over = statistics.median(b - a for a, b in zip(free, found["token_ms"], strict=True))
            mask = statistics.fmean(found["mask_ms"])
            shown[name] |= _mask(found["mask_ms"]) | {"over_ms": round(over, 3), "rest_ms": round(over - mask, 3)}
    return {"answers": shown, "lost_decode_ahead_ms": shown["any_text"]["rest_ms"]}


def _mask(ms: Sequence[float]) -> dict[str, float]:
    """Return the mean, which is what a token costs, and the median: masks of white space and of texts differ much."""
    return {"mask_ms": round(statistics.fmean(ms), 3), "mask_median_ms": round(statistics.median(ms), 3)}
