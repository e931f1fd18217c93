"""The simulation against real stages: one and two of them, with one thread each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.bench.planning.watch import OtherLoad
from cluster.bench.rig import running_head, serve
from cluster.bench.simulation.pipeline import simulate
from cluster.engine.runtime import ClusterRuntime
from cluster.latency.pipeline_work import measured_on
from cluster.planner.forecast import Costs
from cluster.planner.hardware import load_hardware
from cluster.planner.measured import Measurements
from cluster.planner.target import cpu_target
from protos.node.environment import usable_cores

_DISTURBED = 0.2  # cores that others keep busy
_WARM_UP = 512  # tokens


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


def head_costs(runtime: ClusterRuntime) -> Costs:
    """Return what a running head has measured so far, as `longreach plan` uses it."""
    cores = usable_cores()
    of = measured_on(runtime.deployment, runtime.launched.kernel_family, cores)
    measurements = Measurements([(of, runtime.engine.latency.to_json())], cores)
    return cpu_target(load_hardware(), cores=cores).with_measurements(measurements).costs_of(runtime.deployment)
