"""Our one-process runner and transformers on the same checkpoint and ids, in alternation, each in its own process."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from workers.bench.timing import Figure, median_figure

_TIMEOUT_S = 3600
_OURS, _THEIRS = "longreach", "transformers"


def run_peers(model: Path, lengths: list[int], chunk: int, threads: int, repeats: int) -> list[Figure]:
    """Medians of `repeats` runs of both, and the ratio ours / theirs of every figure.

    Raises:
        ValueError: transformers is not installed, or a run failed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("peers: transformers is not installed: pip install 'longreach[test]'")
    texts = ",".join(map(str, lengths))
    commands = {
        _OURS: ["workers.bench", "--threads", str(threads), "--repeats", "1", "decode", "--model", str(model),
                "--lengths", texts, "--chunk", str(chunk)],
        _THEIRS: ["workers.bench.transformers_peer", str(model), texts, str(threads)],
    }  # fmt: skip
    found: dict[str, dict[tuple[str, str], list[float]]] = {name: {} for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            for figure in _run(name, command, threads):
                found[name].setdefault((figure["name"], figure["unit"]), []).append(figure["value"])
    figures = []
    for key, theirs in found[_THEIRS].items():
        ours = found[_OURS][key]
        title, unit = key
        figures.append(median_figure(f"{_OURS}, {title}", ours, unit))
        figures.append(median_figure(f"{_THEIRS}, {title}", theirs, unit))
        ratio = statistics.median(ours) / statistics.median(theirs)
        better = "above 1 is faster" if unit == "tokens/s" else "below 1 is faster"
        figures.append(Figure(f"{_OURS} / {_THEIRS}, {title}", ratio, "ratio", repeats, note=better))
    return figures


def _run(name: str, command: list[str], threads: int) -> list[dict]:
    """Run a module in a process of its own; it writes its figures to a file named by `--json`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        head, *rest = command
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", head, "--json", str(path), *rest], env=environment, capture_output=True,
                text=True, timeout=_TIMEOUT_S, cwd=Path(__file__).resolve().parents[2],
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise ValueError(f"peers: {name}: no result within {_TIMEOUT_S} s; use shorter --lengths") from error
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise ValueError(f"peers: {name}: exit {done.returncode}: {last}")
        return list(json.loads(path.read_text())["figures"])
