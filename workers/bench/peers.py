"""The one-process runner beside transformers: the same checkpoint, ids and threads, each run a process of its own."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.node.peers import Engine, Run, compare, run_peer
from workers.bench.timing import Figure, median_figure

_OURS, _THEIRS = "longreach", "transformers"
_OUR_STEPS, _THEIR_STEPS = 96, 16  # decode steps of a run


@dataclass(frozen=True, slots=True)
class Setup:
    """What both engines run; `chunk` in tokens."""

    model: Path
    chunk: int
    threads: int

    def runner(self, length: int, seed: int) -> Run:
        """Prefill and decode by `python -m workers.bench rounds`, which always takes the same prompt."""
        command = ["-m", "workers.bench", "--threads", str(self.threads), "rounds", "--model", str(self.model)]
        command += ["--lengths", str(length), "--chunk", str(self.chunk), "--tokens", str(_OUR_STEPS)]
        prefill, decode = map(float, run_peer(_OURS, [sys.executable, *command], "prefill\ndecode\n"))
        return {"first_token_s": prefill, "decode_s": decode}

    def transformers(self, length: int, seed: int) -> Run:
        """Prefill and decode the same prompt by transformers."""
        script = Path(__file__).with_name("transformers_peer.py")
        numbers = map(str, (length, _THEIR_STEPS, self.threads))
        return dict(json.loads(run_peer(_THEIRS, [sys.executable, str(script), str(self.model), *numbers])[-1]))


def measure_peers(setup: Setup, lengths: list[int], repeats: int) -> Iterator[Figure]:
    """Yield the medians of `repeats` runs of both, and the ratio ours / theirs of every figure.

    Raises:
        ValueError: transformers is not installed, or a run failed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("peers: transformers is not installed: pip install 'longreach[test]'")
    engines: dict[str, Engine] = {_OURS: setup.runner, _THEIRS: setup.transformers}
    for length in lengths:
        yield from _figures(compare(engines, length, repeats), length, repeats)


def _figures(entry: dict[str, Any], length: int, repeats: int) -> Iterator[Figure]:
    for name in (_OURS, _THEIRS):
        rates = [length / seconds for seconds in entry[name]["first_token_s"]]
        yield median_figure(f"{name}, prefill {length}", rates, "tokens/s")
        yield median_figure(f"{name}, decode at {length}", entry[name]["decode_ms_runs"], "ms a token")
    for title, key, better in (
        (f"prefill {length}", "prefill_tokens_per_s", "above 1 is faster"),
        (f"decode at {length}", "decode_ms", "below 1 is faster"),
    ):
        yield Figure(f"{_OURS} / {_THEIRS}, {title}", entry[f"ratio_{key}"], "ratio", repeats, note=better)
