"""A head in this process, for measuring: the one that `longreach serve` runs, over a bare checkpoint.

Its answers as a client sees them, and its steps that are chunks of long prompts.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from cluster.client.client import Client, Job
from cluster.client.models import TokenEvent
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.server.head import Head
from cluster.tools.assets import needle_dir
from protos.stage.messages import StepPlan


class Served(NamedTuple):
    """Seconds as the client sees them: to the first token, and of a decode step (the mean)."""

    first_token_s: float
    decode_s: float
    job: Job


@contextmanager
def running_head(
    model: Path, chunk: int, threads: int, *, kv_bytes: str = "2GiB", cpus: float = 1.0, stages: int = 1,
    shards: int = 1, max_model_len: str | None = None, max_num_seqs: int = 16, kv_dtype: str = "auto",
    sparse: dict[str, object] | None = None,
) -> Iterator[tuple[Client, ClusterRuntime]]:  # fmt: skip
    """Start a head for token-id prompts; yields a client and the cluster behind it.

    Args:
        chunk: upper bound on the tokens of a step.
        threads: of an actor, which Ray counts as `cpus`.
        sparse: the section of the YAML.
    """
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        linked = folder / "model"
        linked.mkdir()
        for path in model.iterdir():
            if path.suffix in (".json", ".safetensors"):
                (linked / path.name).symlink_to(path.resolve())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if not (linked / name).exists():
                shutil.copy(needle_dir() / name, linked / name)  # prompts are ids; only the file must be there
        settings = {
            "model": {
                "path": str(linked),
                "max_model_len": max_model_len,
                "sampling_defaults": "greedy",
                "allow_beyond_positions": True,
            },
            "data_dir": str(folder / "data"),
            "cluster": {
                "pipeline_parallel_size": stages,
                "expert_parallel_size": shards,
                "threads_per_actor": threads,
                "cpus_per_actor": cpus,
            },
            "kv_cache": {"bytes": kv_bytes, "dtype": kv_dtype},
            "kv_store": {"enabled": False},  # every prompt is computed
            "prefill": {"max_num_batched_tokens": chunk, "max_num_seqs": max_num_seqs},
            "sparse": sparse or {},
        }
        path = folder / "config.yaml"
        path.write_text(json.dumps(settings))  # JSON is YAML too
        with closing(Head(load_deployment(path), port=0)) as head:
            head.start()
            with Client(head.address) as client:
                yield client, head.runtime


def random_ids(length: int, seed: int, vocab_size: int = 32000) -> list[int]:
    """Return uniform ids in 5..31999, or below the vocabulary's size, the same for every peer."""
    rng = random.Random(seed)
    return [rng.randint(5, min(vocab_size, 32000) - 1) for _ in range(length)]


def serve(client: Client, length: int, tokens: int, seed: int, vocab: int = 32000) -> Served:
    """Answer one random prompt with at least two tokens."""
    ids = random_ids(length, seed, vocab)
    began = time.perf_counter()
    job = client.submit(token_ids=ids, max_tokens=tokens, ignore_eos=True)
    times = [time.perf_counter() - began for event in job.stream() if isinstance(event, TokenEvent)]
    return Served(times[0], (times[-1] - times[0]) / (len(times) - 1), job)


class Chunks:
    """Records the steps that have a chunk of one long prompt only; `around` gives their duration at a moment."""

    def __init__(self, longer_than: int) -> None:
        """Ignore steps of at most `longer_than` tokens, which are not chunks of a long prompt."""
        self._longer_than = longer_than
        self._ended: list[float] = []
        self.seconds: list[float] = []

    def note(self, plan: StepPlan, seconds: float, now: float | None = None) -> None:
        """Record a step that has just ended, if it is such a chunk."""
        if len(plan.slices) == 1 and plan.num_tokens > self._longer_than:
            self._ended.append(time.perf_counter() if now is None else now)
            self.seconds.append(seconds)

    def around(self, start: float, stop: float) -> float:
        """Return the median seconds of the chunks between two moments, with the last one before and the first after."""
        first = sum(ended < start for ended in self._ended)
        last = sum(ended - took < stop for ended, took in zip(self._ended, self.seconds, strict=True))
        return statistics.median(self.seconds[max(0, first - 1) : last + 1])
