"""The whole cluster (1 x 1, through the client) beside vLLM on the CPU: the same checkpoint, lengths and threads.

Both start afresh for every run. Prefill is the time to the first token of a prompt that is new to the engine.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.bench.rig import one_actor, random_ids, running_head, token_times
from protos.node.peers import Engine, Run, compare, run_peer

_WARM_UP = 4096  # tokens
SPARSE: dict[str, object] = {
    "enabled": True, "threshold": 0, "n_vertical": 1024, "n_slash": 2048, "synthetic": True, "recall_floor": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Setup:
    """What both engines run; `cell` in tokens, None for dense attention (vLLM's is dense in any case)."""

    model: Path
    chunk: int
    threads: int
    decode: int  # tokens after the first
    cell: int | None

    def cluster(self, length: int, seed: int) -> Run:
        """Answer one prompt through the client of a new cluster; with sparse attention the result has its summary."""
        sections = one_actor(max(self.chunk, self.cell or 0), self.threads, kv_bytes="4GiB")
        sections["sparse"] = {"enabled": False} if self.cell is None else SPARSE | {"cell": self.cell}
        with running_head(self.model, sections) as (client, _):
            client.submit(token_ids=random_ids(_WARM_UP, 0), max_tokens=4, ignore_eos=True).wait()
            began = time.perf_counter()
            job = client.submit(token_ids=random_ids(length, seed), max_tokens=1 + self.decode, ignore_eos=True)
            times = token_times(job, began)
            attention = job.result.attention
        run: Run = {"first_token_s": times[0], "decode_s": (times[-1] - times[0]) / self.decode}
        if self.cell is not None:
            run["attention"] = {name: attention[name] for name in ("density", "estimate_share")}
        return run

    def vllm(self, python: Path, length: int, seed: int) -> Run:
        """Answer one prompt by vLLM, run by a Python that has it."""
        script = Path(__file__).with_name("vllm_peer.py")
        numbers = map(str, (length, self.decode, seed, self.threads))
        return dict(json.loads(run_peer("vllm", [str(python), str(script), str(self.model), *numbers])[-1]))


def measure_peers(setup: Setup, lengths: list[int], repeats: int, vllm_python: Path | None) -> list[dict[str, Any]]:
    """Return an entry a prompt length, as `protos.node.peers.compare` does; without `vllm_python` of one engine."""
    engines: dict[str, Engine] = {"longreach": setup.cluster}
    if vllm_python is not None:
        engines["vllm"] = lambda length, seed: setup.vllm(vllm_python, length, seed)
    mode = {"mode": "dense" if setup.cell is None else "sparse"}
    return [mode | compare(engines, length, repeats) for length in lengths]
