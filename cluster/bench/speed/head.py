"""Heads to measure: the one that `longreach serve` runs, in this process, over the deployment of a benchmark."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cluster.bench.planning.watch import PeakMemory
from cluster.bench.rig import random_ids
from cluster.bench.speed.settings import Bench
from cluster.client.client import Client, Job
from cluster.client.models import TokenEvent
from cluster.config.deployment import Deployment, load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.engine.stage_split import balance_stages
from cluster.hub.names import HubName
from cluster.planner.memory import account
from cluster.server.head import Head
from cluster.stages.launcher import LaunchStatus
from cluster.tools.eval.modes import kv_bytes_for
from protos.errors import UserError
from protos.model.files import is_gguf

_VOCABULARY = 32000  # ids of random prompts are below it, as those of peers


class Layout(NamedTuple):
    """Stages of a pipeline, and shards of each."""

    stages: int = 1
    shards: int = 1

    def __str__(self) -> str:
        return f"{self.stages} x {self.shards}"

    @property
    def processes(self) -> int:
        """Stage processes in all."""
        return self.stages * self.shards


class Served(NamedTuple):
    """What a client saw of one answer, in seconds: to the first token, and of a decode step (the mean)."""

    first_token_s: float
    decode_s: float
    job: Job


@dataclass(frozen=True, slots=True)
class MeasuredHead:
    """A running head, and a client of it; `peak` watches its stages, where they are processes on processors here."""

    deployment: Deployment
    client: Client
    runtime: ClusterRuntime
    peak: PeakMemory | None = None

    def prompt(self, length: int, seed: int) -> list[int]:
        """Return random token ids of the model's vocabulary; the same for every layout, mode and peer."""
        return prompt_ids(length, seed, self.deployment.spec.vocab_size)

    def serve(self, ids: list[int], tokens: int) -> Served:
        """Answer one prompt with at least two tokens."""
        began = time.perf_counter()
        job = self.client.submit(token_ids=ids, max_tokens=tokens, ignore_eos=True)
        times = [time.perf_counter() - began for event in job.stream() if isinstance(event, TokenEvent)]
        return Served(times[0], (times[-1] - times[0]) / (len(times) - 1), job)

    def memory(self, context: int) -> dict[str, Any]:
        """Return the most that all stages together have used so far, beside what `longreach plan` says of a context."""
        if self.peak is None:
            return {}
        planned = sum(shard.total_bytes for shard in account(self.deployment, context))
        return {"memory": {"peak_bytes": sum(self.peak.peaks), "planned_bytes": planned}}


def prompt_ids(length: int, seed: int, vocab_size: int) -> list[int]:
    """Return the ids of a random prompt."""
    return random_ids(length, seed, min(_VOCABULARY, vocab_size))


def load_measured(
    bench: Bench, mode: str, layout: Layout, tokens: int, more: Mapping[str, object], data_dir: str | None = None
) -> Deployment:
    """Return the deployment of a mode and a layout with KV for so many tokens. Raises ConfigError, UserError.

    It stores no KV and listens only where the benchmark connects.

    Args:
        tokens: of all contexts that are in memory together.
        more: further dotted keys, over those of the mode.
    """
    settings = bench.settings
    overrides = bench.of_mode(mode)
    overrides |= {
        "model.sampling_defaults": "greedy", "kv_store.enabled": False, "server.http_port": 0,
        "server.metrics_port": 0, "cluster.pipeline_parallel_size": layout.stages,
        "cluster.expert_parallel_size": layout.shards, **more,
    }  # fmt: skip
    if data_dir is not None:
        overrides["data_dir"] = data_dir
    deployment = balance_stages(load_deployment(settings.config, overrides))
    if deployment.config.kv_cache.fraction is None and "kv_cache.bytes" not in overrides:
        overrides["kv_cache.bytes"] = kv_bytes_for(deployment, tokens)
        deployment = balance_stages(load_deployment(settings.config, overrides))
    return deployment


@contextmanager
def measured_head(
    bench: Bench, mode: str, layout: Layout, tokens: int, *, max_len: int = 0, trace: bool = False,
    on_status: Callable[[LaunchStatus], None] = lambda status: None,
) -> Iterator[MeasuredHead]:  # fmt: skip
    """Start a head, compute the prompt of the warm-up, and stop the head at the end. Raises as `load_measured`.

    Args:
        tokens: of all contexts that are in memory together, warm-up aside.
        max_len: of the longest context; 0: `tokens`.
        trace: have every shard report when it worked on each step.
    """
    warm_up = max(2, bench.settings.warm_up)
    longest = max(max_len or tokens, warm_up + 4)
    with tempfile.TemporaryDirectory(prefix="longreach-bench-") as folder:
        more: dict[str, object] = {"model.max_model_len": longest, "cluster.trace_steps": trace}
        deployment = load_measured(bench, mode, layout, max(tokens, longest), more, str(Path(folder) / "data"))
        with closing(Head(deployment, on_status, port=0)) as running:
            running.start()
            with Client(running.address) as client, _watch(running.runtime) as peak:
                head = MeasuredHead(running.runtime.deployment, client, running.runtime, peak)
                if bench.settings.warm_up:
                    head.serve(head.prompt(warm_up, 1 << 30), 4)
                yield head


def _watch(runtime: ClusterRuntime) -> PeakMemory | nullcontext[None]:
    """Return what samples the memory of the stages; nothing where that of a GPU counts, or of another machine."""
    cluster = runtime.deployment.config.cluster
    is_here = cluster.device == "cpu" and cluster.address == "local"
    return PeakMemory(runtime.launched.pids) if is_here else nullcontext()


def check_lengths(bench: Bench, longest: int, layouts: list[Layout]) -> None:
    """Load every mode and layout for the longest context, so that a fault is found before anything is started.

    Raises ConfigError, UserError.
    """
    for mode in bench.settings.modes:
        for layout in layouts:
            load_measured(bench, mode, layout, longest, {"model.max_model_len": longest})


def attention_of(served: Served) -> dict[str, Any]:
    """Return the share of pairs that a sparse prefill visited and of time it spent on choosing; {} where dense."""
    attention = served.job.result.attention
    if not attention or attention.get("mode") == "dense":
        return {}
    return {name: round(float(attention[name]), 6) for name in ("density", "estimate_share") if name in attention}


def check_model(bench: Bench) -> None:
    """Raise UserError where the checkpoint of a benchmark is missing, with the command that makes the built-in one."""
    model = bench.settings.model
    if model is None or HubName.parse(str(model)) is not None:
        return
    if not (model if is_gguf(model) else model / "config.json").is_file():
        make = "python -m workers.bench make-checkpoint DIR"
        raise UserError(f"{bench.file}: model: {model}: no config.json there: name a checkpoint by --model ({make})")
