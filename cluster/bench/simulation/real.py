"""The simulation against real stages: one and two that compute, with one thread each, and more that only wait."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.bench.planning.watch import OtherLoad
from cluster.bench.rig import running_head, serve
from cluster.bench.simulation.pipeline import simulate
from cluster.config.deployment import Deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.latency.hardware import load_hardware
from cluster.latency.measured import Costs, Measurements
from cluster.latency.pipeline_work import measured_on
from cluster.planner.memory import relayout
from cluster.planner.subject import as_dense, load_subject
from cluster.planner.target import cpu_target
from protos.node.environment import usable_cores

_DISTURBED = 0.2  # cores that others keep busy
_WARM_UP = 512  # tokens
_PACE = "LONGREACH_PACE"  # read by workers.runner.paced
_CHUNK_S = 0.1


def check_stages(
    model: Path, length: int, chunk: int, repeats: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:  # fmt: skip
    """Return for one and two real stages the simulated and the measured seconds to the first token.

    The costs are those that the head itself fitted to prompts of half the length; the whole length is simulated before
    it is measured. The median of `repeats` counts.
    """
    rows = []
    for stages in (1, 2):
        head = running_head(
            model, chunk, threads=1, cpus=usable_cores() / 2 / stages, stages=stages, kv_bytes="64GiB", max_num_seqs=1,
            max_model_len=str(length + 64), sparse={"enabled": False},
        )  # fmt: skip
        with head as (client, runtime):
            vocab = runtime.deployment.spec.vocab_size
            for number, tokens in enumerate((_WARM_UP, length // 8, length // 2)):
                say(f"{stages} stages: reading {tokens:,} tokens")
                serve(client, tokens, 2, number, vocab)
            simulated = simulate(runtime.deployment, head_costs(runtime), length).seconds
            load = OtherLoad(runtime.launched.pids)
            runs = [serve(client, length, 2, 10 + number, vocab) for number in range(repeats)]
            measured = sorted(run.first_token_s for run in runs)
            others = load.cores()
        middle = measured[len(measured) // 2]
        rows.append(
            {
                "stages": stages, "length": length, "simulated_s": simulated, "measured_s": measured,
                "error": round(simulated / middle - 1, 4), "other_load_cores": others, "disturbed": others > _DISTURBED,
            }
        )  # fmt: skip
        say(f"{stages} stages: {simulated:.2f} s simulated, {middle:.2f} s measured ({rows[-1]['error']:+.1%})")
    return rows


def check_processes(
    model: Path, costs_of: Callable[[Deployment], Costs], length: int, chunk: int, stages: int, repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Return the simulated and the measured seconds of stages that wait their predicted times in real processes.

    Scheduler, service and transport are real; times are scaled so that the mean chunk of a stage takes `_CHUNK_S`.

    Args:
        costs_of: of a unit of work, on the hardware that is simulated.
    """
    with tempfile.TemporaryDirectory() as folder, _paced(Path(folder) / "pace.json") as pace:
        given = relayout(as_dense(load_subject(model, "cpu", chunk=chunk)), stages, 1)
        bars = simulate(given, costs_of(given), length).bars
        scale = _CHUNK_S * len(bars) / sum(bar.stop_s - bar.start_s for bar in bars)
        costs = costs_of(given)
        costs = replace(costs, seconds=tuple(scale * one for one in costs.seconds), link_s=0.0, hop_s=0.0)
        run = simulate(given, costs, length)
        chunks: dict[str, dict[str, float]] = {}
        for bar in run.bars:
            chunks.setdefault(str(bar.stage), {})[f"{bar.first}:{bar.tokens}"] = bar.stop_s - bar.start_s
        pace.write_text(json.dumps(chunks))
        head = running_head(
            model, chunk, threads=1, cpus=usable_cores() / 2 / stages, stages=stages, kv_bytes="64GiB", max_num_seqs=1,
            max_model_len=str(length + 64), sparse={"enabled": False},
        )  # fmt: skip
        with head as (client, runtime):
            serve(client, chunk // 2, 2, 0, given.spec.vocab_size)
            load = OtherLoad(runtime.launched.pids)
            runs = [serve(client, length, 2, 10 + number, given.spec.vocab_size) for number in range(repeats)]
            others = load.cores()
    measured = sorted(served.first_token_s for served in runs)
    error = run.seconds / measured[len(measured) // 2] - 1
    say(f"{stages} processes that wait: {run.seconds:.2f} s simulated, {measured} s measured ({error:+.1%})")
    return {
        "stages": stages, "length": length, "chunk": chunk, "scale": scale, "simulated_s": run.seconds,
        "measured_s": measured, "error": round(error, 4), "bubbles": round(run.bubbles(), 4),
        "other_load_cores": others, "disturbed": others > _DISTURBED,
    }  # fmt: skip


@contextmanager
def _paced(path: Path) -> Iterator[Path]:
    """Let the stages that are started in the block wait as the file says."""
    os.environ[_PACE] = str(path)
    try:
        yield path
    finally:
        del os.environ[_PACE]


def head_costs(runtime: ClusterRuntime) -> Costs:
    """Return what a running head has measured so far, as `longreach plan` uses it."""
    cores = usable_cores()
    of = measured_on(runtime.deployment, runtime.launched.kernel_family, cores)
    measurements = Measurements([(of, runtime.engine.latency.to_json())], cores)
    return cpu_target(load_hardware(), cores=cores).with_measurements(measurements).costs_of(runtime.deployment)
