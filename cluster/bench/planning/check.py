"""The planner against measurement: five shapes, each predicted from shorter runs of the same head, then measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from cluster.bench.planning.watch import OtherLoad, PeakMemory
from cluster.bench.resumable import Results
from cluster.bench.rig import Served, running_head, serve
from cluster.bench.simulation.real import head_costs
from cluster.client.client import Client
from cluster.common.units import format_count
from cluster.engine.runtime import ClusterRuntime
from cluster.planner.forecast import predict
from cluster.planner.memory import account
from protos.node.environment import usable_cores

_DISTURBED = 0.2  # cores that others keep busy: a row with more is marked
SPARSE: dict[str, object] = {
    "enabled": True, "threshold": 0, "n_vertical": 1024, "n_slash": 2048, "cell": 2048, "synthetic": True,
    "recall_floor": 0.0,
}  # fmt: skip
_WARM_UP = 512  # tokens: new shapes are compiled
_PAGE = 64


@dataclass(frozen=True, slots=True)
class Shape:
    """A layout and a way to compute; `scale` is its length as a share of the length asked for."""

    name: str
    stages: int = 1
    shards: int = 1
    sparse: bool = False
    kv: str = "auto"
    scale: float = 1.0


SHAPES = (
    Shape("1 x 1, dense"),
    Shape("1 x 1, sparse", sparse=True, scale=2.0),
    Shape("2 x 1, dense", stages=2),
    Shape("1 x 2, dense", shards=2),
    Shape("1 x 1, int8 KV", kv="int8"),
)


@dataclass(frozen=True, slots=True)
class Amount:
    """What every shape reads: prompt tokens and tokens of a step, then decode steps, so many times."""

    length: int
    chunk: int
    decode: int
    repeats: int = 1


def check_plan(model: Path, amount: Amount, resume: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """Return predicted and measured memory and times of every shape, with their errors.

    Every head reads an eighth and a half of the length first, which is all that the predictions know. Times are the
    medians of the repeats, each of another prompt. Rows that others have disturbed are marked.

    Args:
        resume: a file of JSON lines; shapes it has are not measured again.
    """
    run = {"model": model.resolve().name} | asdict(amount)
    results = Results(resume, run)
    done = {row["shape"]["name"] for row in results.rows}
    for number, shape in enumerate(SHAPES, start=1):
        if shape.name not in done:
            row = _check_shape(model, shape, replace(amount, length=round(amount.length * shape.scale)), say)
            results.add(row)
            say(f"{number} of {len(SHAPES)}: {shape.name}: {_summary(row)}")
    rows = results.rows
    errors = {
        "memory": max(abs(row["memory"]["error"]) for row in rows),
        "prefill": max(abs(row["prefill_s"]["error"]) for row in rows),
        "decode": max(abs(row["decode_s"]["error"]) for row in rows),
    }
    met = errors["memory"] <= 0.05 and max(errors["prefill"], errors["decode"]) <= 0.2
    return run | {"rows": rows, "largest_errors": errors, "met": met}


def _check_shape(model: Path, shape: Shape, amount: Amount, say: Callable[[str], None]) -> dict[str, Any]:
    actors, length, decode = shape.stages * shape.shards, amount.length, amount.decode
    threads = max(1, usable_cores() // actors)
    context = length + decode + 1
    head = running_head(
        model, amount.chunk, threads, kv_bytes="64GiB", cpus=usable_cores() / actors / 2, stages=shape.stages,
        shards=shape.shards, max_model_len=str(-(-context // _PAGE) * _PAGE), max_num_seqs=1, kv_dtype=shape.kv,
        sparse=SPARSE if shape.sparse else {"enabled": False},
    )  # fmt: skip
    with head as (client, runtime):
        for number, tokens in enumerate((_WARM_UP, length // 8, length // 2)):
            say(f"{shape.name}: reading {format_count(tokens)} tokens")
            serve(client, tokens, 2 if number == 0 else decode // 2, number, runtime.deployment.spec.vocab_size)
        predicted = _predict(runtime, length, context)
        say(f"{shape.name}: {format_count(length)} tokens, {predicted['prefill_s']:.1f} s predicted")
        row, runs = _measure(client, runtime, amount)
    row |= {
        "shape": asdict(shape), "length": length, "threads": threads, "times_from": predicted["times_from"],
        "memory": _compare(predicted["memory"], row.pop("peak_bytes")),
        "prefill_s": _compare(predicted["prefill_s"], *(run.first_token_s for run in runs)),
        "decode_s": _compare(predicted["decode_s"], *(run.decode_s for run in runs)),
    }  # fmt: skip
    return row


def _predict(runtime: ClusterRuntime, length: int, context: int) -> dict[str, Any]:
    """Return what `longreach plan` says of a running deployment, from what its head has measured so far."""
    deployment, costs = runtime.deployment, head_costs(runtime)
    forecast = predict(deployment, length, costs)
    memory = sum(shard.total_bytes for shard in account(deployment, context))
    return {
        "memory": memory, "prefill_s": forecast.prefill_s, "decode_s": forecast.decode_s, "times_from": costs.source
    }  # fmt: skip


def _measure(client: Client, runtime: ClusterRuntime, amount: Amount) -> tuple[dict[str, Any], list[Served]]:
    vocabulary = runtime.deployment.spec.vocab_size
    pids = runtime.launched.pids
    load = OtherLoad(pids)
    with PeakMemory(pids) as memory:
        runs = [serve(client, amount.length, amount.decode + 1, 9 + n, vocabulary) for n in range(amount.repeats)]
    others = load.cores()
    row = {"peak_bytes": sum(memory.peaks), "other_load_cores": others, "disturbed": others > _DISTURBED}
    return row, runs


def _compare(predicted: float, *measured: float) -> dict[str, Any]:
    """Return a prediction beside the median of the repeats, which are listed if there are several."""
    middle = median(measured)
    row = {"predicted": predicted, "measured": middle, "error": round(predicted / middle - 1, 4)}
    return row | ({"repeats": measured} if len(measured) > 1 else {})


def _summary(row: dict[str, Any]) -> str:
    shown = [
        f"memory {row['memory']['error']:+.1%}",
        f"prefill {row['prefill_s']['measured']:.1f} s ({row['prefill_s']['error']:+.1%})",
        f"decode {row['decode_s']['measured'] * 1e3:.1f} ms ({row['decode_s']['error']:+.1%})",
    ]
    return ", ".join(shown) + (f"; others kept {row['other_load_cores']} cores busy" if row["disturbed"] else "")
