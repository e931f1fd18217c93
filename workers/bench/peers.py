"""The one-process runner beside transformers: the same checkpoint, ids and threads, each run a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from protos.node.peers import Engine, Run, compare, run_peer
from workers.bench.timing import Figure, median_figure

_OURS, _THEIRS = "longreach", "transformers"
_OUR_STEPS, _THEIR_STEPS = 96, 16  # decode steps of a run


def measure_peers(model: Path, chunk: int, threads: int, lengths: list[int], repeats: int) -> Iterator[Figure]:
    """Yield the medians of `repeats` runs of both, and the ratio ours / theirs of every figure.

    Raises:
        ValueError: transformers is not installed, or a run failed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("peers: transformers is not installed: pip install 'longreach[test]'")

    def runner(length: int, seed: int) -> Run:  # always the same prompt
        command = [sys.executable, "-m", "workers.bench", "--threads", threads, "rounds", "--model", model]
        command += ["--lengths", length, "--chunk", chunk, "--tokens", _OUR_STEPS]
        prefill, decode = map(float, run_peer(_OURS, command, "prefill\ndecode\n"))
        return {"first_token_s": prefill, "decode_s": decode}

    def transformers(length: int, seed: int) -> Run:
        script = Path(__file__).with_name("transformers_peer.py")
        return dict(json.loads(run_peer(_THEIRS, [sys.executable, script, model, length, _THEIR_STEPS, threads])[-1]))

    engines: dict[str, Engine] = {_OURS: runner, _THEIRS: transformers}
    for length in lengths:
        entry = compare(engines, length, repeats)
        for name in engines:
            rates = [length / seconds for seconds in entry[name]["first_token_s"]]
            yield median_figure(f"{name}, prefill {length}", rates, "tokens/s")
            yield median_figure(f"{name}, decode at {length}", entry[name]["decode_ms_runs"], "ms a token")
        for what, key, better in (
            ("prefill", "prefill_tokens_per_s", "above 1 is faster"),
            ("decode at", "decode_ms", "below 1 is faster"),
        ):
            title = f"{_OURS} / {_THEIRS}, {what} {length}"
            yield Figure(title, entry[f"ratio_{key}"], "ratio", repeats, note=better)
