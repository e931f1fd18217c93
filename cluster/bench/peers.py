"""The whole cluster (1 x 1, through the client) beside vLLM on the CPU: the same checkpoint, lengths and threads.

Both sides start afresh for every run and take turns, so that what disturbs the machine disturbs both. Prefill is the
time to the first token of a prompt that is new to the engine.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.bench.rig import random_ids, running_head, token_times
from protos.errors import UserError

_TIMEOUT_S = 3600
_WARM_UP = 4096
SPARSE: dict[str, object] = {
    "enabled": True, "threshold": 0, "n_vertical": 1024, "n_slash": 2048, "synthetic": True, "recall_floor": 0.0,
}  # fmt: skip


def compare(
    model: Path, lengths: list[int], mode: str, chunk: int, threads: int, repeats: int, decode: int,
    peer_python: Path | None, cell: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """An entry a length: seconds of every run, medians as tokens/s and ms, and the ratio to vLLM if it ran too."""
    found = []
    for length in lengths:
        ours, theirs = [], []
        for seed in range(1, repeats + 1):
            ours.append(_ours(model, length, mode, chunk, threads, decode, seed, cell))
            print(f"{length}: longreach {mode}: {length / ours[-1]['first_token_s']:.0f} tokens/s", file=sys.stderr)
            if peer_python is not None:
                theirs.append(_vllm(peer_python, model, length, threads, decode, seed))
                print(f"{length}: vllm: {length / theirs[-1]['first_token_s']:.0f} tokens/s", file=sys.stderr)
        entry: dict[str, Any] = {"length": length, "mode": mode, "longreach": _summary(length, ours)}
        if mode == "sparse":
            entry["longreach"]["attention"] = ours[-1]["attention"]
        if theirs:
            entry["vllm"] = _summary(length, theirs) | {"version": theirs[0]["version"]}
            for key in ("prefill_tokens_per_s", "decode_ms"):
                entry[f"ratio_{key}"] = round(entry["longreach"][key] / entry["vllm"][key], 3)
        found.append(entry)
    return found


def _summary(length: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = [run["first_token_s"] for run in runs]
    decode = [run["decode_s"] for run in runs]
    return {
        "prefill_tokens_per_s": round(length / statistics.median(first), 1),
        "decode_ms": round(statistics.median(decode) * 1e3, 2),
        "first_token_s": [round(value, 3) for value in first],
        "decode_ms_runs": [round(value * 1e3, 2) for value in decode],
    }


def _ours(
    model: Path, length: int, mode: str, chunk: int, threads: int, decode: int, seed: int, cell: int
) -> dict[str, Any]:
    sections: dict[str, dict[str, object]] = {
        "cluster": {"threads_per_actor": threads, "cpus_per_actor": 1.0},
        "kv_cache": {"bytes": "4GiB"},
        "prefill": {"max_num_batched_tokens": max(chunk, cell) if mode == "sparse" else chunk},
        "sparse": SPARSE | {"cell": cell} if mode == "sparse" else {"enabled": False},
    }
    with tempfile.TemporaryDirectory() as folder, running_head(model, Path(folder), **sections) as (client, _):
        client.submit(token_ids=random_ids(_WARM_UP, 0), max_tokens=4, ignore_eos=True).wait()
        began = time.perf_counter()
        job = client.submit(token_ids=random_ids(length, seed), max_tokens=1 + decode, ignore_eos=True)
        times = token_times(job, began)
        attention = job.result.attention if mode == "sparse" else None
    seconds = (times[-1] - times[0]) / decode  # of a step: tokens arrive in groups
    found: dict[str, Any] = {"first_token_s": times[0], "decode_s": seconds}
    if attention is not None:
        found["attention"] = {name: attention[name] for name in ("density", "estimate_share")}
    return found


def _vllm(python: Path, model: Path, length: int, threads: int, decode: int, seed: int) -> dict[str, Any]:
    script = Path(__file__).with_name("vllm_peer.py")
    command = [str(python), str(script), str(model), *map(str, (length, decode, seed, threads))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"peers: vllm: no result within {_TIMEOUT_S} s; use shorter --lengths") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"peers: vllm: exit {done.returncode}: {last}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
