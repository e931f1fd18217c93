"""A head in this process, for measuring: the one that `longreach serve` runs, over a bare checkpoint."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from cluster.client.client import Client, Job
from cluster.client.models import TokenEvent
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.server.head import Head
from cluster.tools.assets import needle_dir


@contextmanager
def running_head(
    model: Path, sections: dict[str, dict[str, object]], model_settings: dict[str, object] | None = None
) -> Iterator[tuple[Client, ClusterRuntime]]:
    """Start a head for token-id prompts with these sections of the YAML; yields a client and the cluster behind it."""
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
        settings = {"path": str(linked), **(model_settings or {})}
        path = folder / "config.yaml"  # JSON is YAML too
        path.write_text(json.dumps({"model": settings, "data_dir": str(folder / "data"), **sections}))
        with closing(Head(load_deployment(path), port=0)) as head:
            head.start()
            with Client(head.address) as client:
                yield client, head.runtime


def one_actor(
    chunk: int, threads: int, kv_bytes: str = "2GiB", cpus: float = 1.0, stages: int = 1
) -> dict[str, dict[str, object]]:
    """Return sections of the YAML for stages of one shard, and steps of at most `chunk` tokens."""
    return {
        "cluster": {"pipeline_parallel_size": stages, "threads_per_actor": threads, "cpus_per_actor": cpus},
        "kv_cache": {"bytes": kv_bytes},
        "prefill": {"max_num_batched_tokens": chunk},
    }


def random_ids(length: int, seed: int) -> list[int]:
    """Return uniform ids in 5..31999, the same for every peer."""
    rng = random.Random(seed)
    return [rng.randint(5, 31999) for _ in range(length)]


def token_times(job: Job, began: float) -> list[float]:
    """Return the seconds from `began` to every token of a job, as the client sees them."""
    return [time.perf_counter() - began for event in job.stream() if isinstance(event, TokenEvent)]
