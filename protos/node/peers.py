"""Compare engines on one checkpoint. The engines take turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from protos.errors import UserError

_TIMEOUT_S = 3600

Run = dict[str, Any]  # `first_token_s`, `decode_s` a step, and what else the engine reports
Engine = Callable[[int, int], Run]  # (prompt tokens, seed of the prompt), from a fresh start


def compare(engines: Mapping[str, Engine], length: int, repeats: int) -> dict[str, Any]:
    """Return an entry per engine (medians and single runs), and the ratios of the first to the second if there are two.

    Prompts have `length` tokens; the speed of each run goes to standard error as it ends.
    """
    runs: dict[str, list[Run]] = {name: [] for name in engines}
    for seed in range(1, repeats + 1):
        for name, engine in engines.items():
            run = engine(length, seed)
            runs[name].append(run)
            print(f"{length}: {name}: {length / run['first_token_s']:.0f} tokens/s", file=sys.stderr)
    entry: dict[str, Any] = {"length": length} | {name: _summary(length, done) for name, done in runs.items()}
    if len(engines) > 1:
        ours, theirs = (entry[name] for name in engines)
        for key in ("prefill_tokens_per_s", "decode_ms"):
            entry[f"ratio_{key}"] = round(ours[key] / theirs[key], 3)
    return entry


def _summary(length: int, runs: list[Run]) -> dict[str, Any]:
    first, decode = [run["first_token_s"] for run in runs], [run["decode_s"] * 1e3 for run in runs]
    return {
        "prefill_tokens_per_s": round(length / statistics.median(first), 1),
        "decode_ms": round(statistics.median(decode), 2),
        "first_token_s": [round(value, 3) for value in first],
        "decode_ms_runs": [round(value, 2) for value in decode],
        **{key: value for key, value in runs[-1].items() if key not in ("first_token_s", "decode_s")},
    }


def run_peer(name: str, command: Sequence[object], lines: str = "") -> list[str]:
    """Run an engine in a process of its own, with `lines` on its standard input; returns the lines of its output.

    Raises UserError: it failed, or took more than an hour.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, input=lines, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"peers: {name}: no result within {_TIMEOUT_S} s; use shorter --lengths") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"peers: {name}: exit {done.returncode}: {last}")
    return done.stdout.strip().splitlines()
