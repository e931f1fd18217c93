"""`python -m cluster.bench`: what the service costs, how fair it is, what stored KV saves, what kills do to it."""

from __future__ import annotations

import contextlib
import functools
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from cluster.bench.constraints.commands import CONSTRAINT_COMMANDS
from cluster.bench.cycles import measure_cycles
from cluster.bench.faults.suite import FAULTS, run_faults
from cluster.bench.http.commands import HTTP_COMMANDS
from cluster.bench.kills import measure_kills
from cluster.bench.kv.commands import KV_COMMANDS
from cluster.bench.load import measure_load
from cluster.bench.planning.commands import PLANNING_COMMANDS
from cluster.bench.rig import Chunks, random_ids, running_head, serve
from cluster.bench.soak import draw_soak, measure_soak
from cluster.bench.speed.neighbours import KINDS, Kind, Neighbour, measure_neighbours
from cluster.common.units import parse_count
from protos.node.environment import write_result

_TOKENS = 257  # enough that the length of bursts, which grow with an answer, and the first step hardly matter
_MOST_NEIGHBOURS = 64
_OUT = click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result to this file.")


@contextlib.contextmanager
def _bare_runner(model: Path, length: int, chunk: int, threads: int) -> Iterator[Callable[[str], float]]:
    """Start the one-process runner in a process of its own, which answers in turns with the service.

    Yields a function that returns the seconds of a "prefill", or of a "decode" step (the mean of as many as the service
    makes).
    """
    command = [sys.executable, "-m", "workers.bench", "--threads", str(threads), "rounds", "--model", str(model)]
    command += ["--lengths", str(length), "--chunk", str(chunk), "--tokens", str(_TOKENS - 1)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def measure(what: str) -> float:
            print(what, file=stdin, flush=True)
            return float(stdout.readline())

        try:
            yield measure
        finally:
            process.kill()


def _rounded(seconds: list[float], digits: int = 3, unit: float = 1.0) -> list[float]:
    return [round(value * unit, digits) for value in seconds]


def _median_and_max(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 2), "max": round(max(values), 2)}


def _count(context: click.Context, option: click.Parameter, text: str) -> int:
    return parse_count(text)


@click.group()
def main() -> None:
    """Measure the service on this machine."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends in order, with the heads it has started


for _command in (*KV_COMMANDS, *HTTP_COMMANDS, *CONSTRAINT_COMMANDS, *PLANNING_COMMANDS):
    main.add_command(_command)


def _measurement(command: Callable[..., dict[str, Any]]) -> click.Command:
    """Add a command that prints the result of `command`, with the options of all measurements."""

    @functools.wraps(command)
    def measure(out: Path | None, **options: Any) -> None:
        click.echo(write_result(out, command(**options)))

    for option in (
        _OUT,
        click.option("--chunk", default="2048", callback=_count, help="Tokens of a step."),
        click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, help="A checkpoint."),
    ):
        measure = option(measure)
    return main.command()(measure)


@_measurement
@click.option("--length", default="32K", callback=_count, help="Prompt tokens.")
@click.option("--threads", default=2, help="Threads of the runner and of the one actor.")
@click.option("--repeats", default=3, help="Prefills in turns behind the medians.")
@click.option("--rounds", default=4, help="Decode rounds in turns after each.")
def overhead(model: Path, chunk: int, length: int, threads: int, repeats: int, rounds: int) -> dict[str, Any]:
    """What client, gateway, store, engine and one stage process (1 x 1) add to the bare runner."""
    prefill: list[tuple[float, float]] = []  # bare, served: one after the other, as this machine's speed drifts
    decode: list[tuple[float, float]] = []
    with (
        running_head(model, chunk, threads) as (client, _),
        _bare_runner(model, length, chunk, threads) as bare,
    ):
        bare("decode")
        serve(client, 2 * chunk, 4, 0)
        for seed in range(1, repeats + 1):
            prefill.append((bare("prefill"), serve(client, length, 2, seed).first_token_s))
            for _ in range(rounds):  # the pages of the document are still there
                decode.append((bare("decode"), serve(client, length, _TOKENS, seed).decode_s))
    return {
        "what": "overhead of the service at 1 x 1", "length": length, "chunk": chunk, "threads": threads,
        "bare_prefill_s": _rounded([a for a, _ in prefill]), "served_first_token_s": _rounded([b for _, b in prefill]),
        "prefill_overhead": round(statistics.median(b / a for a, b in prefill) - 1, 4),
        "bare_decode_ms": _rounded([a for a, _ in decode], 2, 1e3),
        "served_decode_ms": _rounded([b for _, b in decode], 2, 1e3),
        "decode_overhead_ms": round(statistics.median(b - a for a, b in decode) * 1e3, 2),
    }  # fmt: skip


@_measurement
@click.option("--length", default="4K", callback=_count, help="Prompt tokens.")
@click.option("--stages", default=2, help="Stages of the longer pipeline.")
@click.option("--repeats", default=3, help="Alternating runs behind the medians.")
def stages(model: Path, chunk: int, length: int, stages: int, repeats: int) -> dict[str, Any]:
    """What each further stage adds to a decode step: pipelines of one and of more stages, one thread an actor."""
    seconds: dict[int, list[float]] = {1: [], stages: []}
    for seed in range(repeats):
        for number, measured in seconds.items():
            with running_head(model, chunk, threads=1, cpus=0.5, stages=number) as (client, _):
                serve(client, 2 * chunk, 4, 1000 + seed)
                measured.append(serve(client, length, _TOKENS, seed).decode_s)
    one, more = (statistics.median(measured) for measured in seconds.values())
    return {
        "what": "a decode step of pipelines of one and of more stages, one thread an actor", "length": length,
        "chunk": chunk, "stages": stages,
        "decode_ms": {str(number): _rounded(measured, 2, 1e3) for number, measured in seconds.items()},
        "further_stage_ms": round((more - one) * 1e3 / (stages - 1), 2),
    }  # fmt: skip


@_measurement
@click.option("--length", default="32K", callback=_count, help="Tokens of the long prompts.")
@click.option("--short", default=200, help="Tokens of the short prompts.")
@click.option("--count", default=12, help="Short jobs measured.")
def fairness(model: Path, chunk: int, length: int, short: int, count: int) -> dict[str, Any]:
    """First token of short jobs beside long prefills that follow each other without a pause."""
    stop = threading.Event()
    with running_head(model, chunk, threads=2) as (client, runtime):
        chunks = Chunks(short)
        runtime.engine.on_step = chunks.note

        def long_jobs() -> None:
            seed = 1000
            while not stop.is_set():
                seed += 1
                client.submit(token_ids=random_ids(length, seed), max_tokens=1, ignore_eos=True).wait()

        background = threading.Thread(target=long_jobs)
        background.start()
        time.sleep(5)
        waits, around = [], []
        rng = random.Random(0)
        for index in range(count):
            time.sleep(rng.uniform(0.1, 2.0))
            asked = time.perf_counter()
            waits.append(serve(client, short, 2, index).first_token_s)
            around.append((asked, asked + waits[-1]))
        stop.set()
        background.join()
    step = statistics.median(chunks.seconds)
    local = [chunks.around(*window) for window in around]
    return {
        "what": "first token of short jobs beside long prefills", "length": length, "short": short, "chunk": chunk,
        "chunk_s": round(step, 3), "first_token_s": _rounded(waits), "chunk_s_around": _rounded(local),
        "first_token_in_chunks": _median_and_max([wait / step for wait in waits]),
        "first_token_in_chunks_around": _median_and_max([w / seconds for w, seconds in zip(waits, local, strict=True)]),
    }  # fmt: skip


@_measurement
@click.option("--clients", default=20, help="Clients at a time.")
@click.option("--jobs", default=200, help="Jobs of a round, shared by the clients.")
@click.option("--rounds", default=3, help="Rounds; the first also fills caches.")
def load(model: Path, chunk: int, clients: int, jobs: int, rounds: int) -> dict[str, Any]:
    """Memory and descriptors of head and stage before and after rounds of many small jobs."""
    head = running_head(model, chunk, threads=1, kv_bytes="256MiB", cpus=0.5, max_model_len="4k")
    with head as (client, runtime):
        result = measure_load(client, runtime, clients, jobs, rounds)
    return {"what": "memory and descriptors under load", "chunk": chunk} | result


def _counts(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) <= _MOST_NEIGHBOURS for word in words):
        raise click.BadParameter(f"{text}: must be whole numbers from 0 to {_MOST_NEIGHBOURS}, such as 0,1,2,4")
    return [int(word) for word in words]


def _program(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    try:
        words = ["true"] if text is None else shlex.split(text)
    except ValueError as error:
        raise click.BadParameter(f"{text}: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise click.BadParameter(f"{text}: its first word must be a program: a name on PATH, or a path")
    return text


def _say(line: str) -> None:
    click.echo(line, err=True)


@_measurement
@click.option("--length", default="4K", callback=_count, help="Prompt tokens.")
@click.option("--threads", type=click.IntRange(1), default=2, help="Threads of the runner and of the one actor.")
@click.option("--counts", default="0,1,2,4", callback=_counts, help="Numbers of busy processes; the first is 1.0.")
@click.option("--kind", type=click.Choice(KINDS), default="loop", help="What they do; `pinned`: each on one core.")
@click.option(
    "--command",
    callback=_program,
    help="A program in their place, such as a server without requests; try --counts 0,1.",
)
@click.option("--settle", type=click.FloatRange(0), default=1.0, help="Seconds until they have begun.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Prefills of each in turns behind a median.")
def neighbours(
    model: Path, chunk: int, length: int, threads: int, counts: list[int], kind: Kind, command: str | None,
    settle: float, repeats: int,
) -> dict[str, Any]:  # fmt: skip
    """Prefill through the service and in the bare runner beside other programs on the same cores."""
    program = Neighbour(kind, command, settle)
    seeds = iter(range(1, 1 << 20))
    with (
        running_head(model, chunk, threads) as (client, _),
        _bare_runner(model, length, chunk, threads) as bare,
    ):

        def served() -> float:
            return length / serve(client, length, 2, next(seeds)).first_token_s

        def alone() -> float:
            return length / bare("prefill")

        rates: dict[str, Callable[[], float]] = {"served": served, "bare": alone}
        for rate in rates.values():
            rate()
        rows = measure_neighbours(rates, counts, program, repeats, _say)
    what = "prefill beside busy processes"
    beside = Path(shlex.split(command)[0]).name if command else kind
    return {"what": what, "length": length, "chunk": chunk, "threads": threads, "kind": beside, "rows": rows}


@main.command()
@click.option("--kills", "count", type=click.IntRange(1), default=200, show_default=True, help="SIGKILLs in all.")
@click.option("--seed", default=1, show_default=True, help="Of the order, the pauses and the jobs.")
@click.option("--stages", type=click.IntRange(1), default=2, show_default=True, help="Stages of the pipeline.")
@click.option("--shards", type=click.IntRange(1), default=2, show_default=True, help="Shards a stage.")
@click.option("--jobs", type=click.IntRange(1), default=6, show_default=True, help="Jobs in flight at a time.")
@click.option(
    "--resume", type=click.Path(path_type=Path), help="A file of JSON lines: batches it has are not run again."
)
@click.option("--full-restarts", is_flag=True, help="Never replace stages alone: start all anew after each failure.")
@_OUT
def kills(
    out: Path | None, count: int, seed: int, stages: int, shards: int, jobs: int, resume: Path | None,
    full_restarts: bool,
) -> None:  # fmt: skip
    """Kill head, stages, shards, raylet and GCS at random under jobs of the demo model, in batches of 10 kills a head.

    No job may be lost, no token changed, and no more computed again than one block, one chunk a stage and what was not
    stored yet.
    """
    _say(f"seed {seed}")
    what = "jobs under random SIGKILLs of head, stage, shard, raylet and GCS"
    result = {"what": what} | measure_kills(count, seed, stages, shards, jobs, resume, _say, full_restarts)
    click.echo(write_result(out, result))
    if result["problems"] or result["beyond_bound"]:
        raise SystemExit(1)


@main.command()
@click.option("--count", type=click.IntRange(1), default=30, show_default=True, help="Cycles, after one to warm up.")
@_OUT
def cycles(out: Path | None, count: int) -> None:
    """Count what `up`, `submit` and `down` of the demo model leave behind on this machine."""
    what = "files, processes and descriptors after cycles of up, submit, down"
    result = {"what": what} | measure_cycles(count, _say)
    click.echo(write_result(out, result))
    if any(result["left"].values()):
        raise SystemExit(1)


@main.command()
@click.option("--seed", default=1, show_default=True, help="Of victims, moments and inputs.")
@click.option("--only", multiple=True, help="Name of a fault; may be given several times. Default: all.")
@click.option("--resume", type=click.Path(path_type=Path), help="A file of JSON lines: what it has is not run again.")
@click.option("--quick", is_flag=True, help="Short documents and fewer victims, as in continuous integration.")
@_OUT
def faults(out: Path | None, seed: int, only: tuple[str, ...], resume: Path | None, quick: bool) -> None:
    """Put 36 faults into heads over the demo model and judge what clients saw; see docs/faults.md."""
    known = {fault.name for fault in FAULTS}
    if unknown := set(only) - known:
        raise click.BadParameter(f"{min(unknown)}: must be one of {', '.join(sorted(known))}", param_hint="--only")
    _say(f"seed {seed}")
    result = run_faults(seed, only, not quick, resume, _say)
    click.echo(write_result(out, result))
    if result["failed"]:
        raise SystemExit(1)


@main.command()
@click.option("--minutes", type=click.FloatRange(0.5), default=20.0, show_default=True, help="Of work.")
@click.option("--seed", default=1, show_default=True, help="Of jobs, documents and faults.")
@click.option("--kills/--no-kills", default=True, show_default=True, help="Whether processes are killed meanwhile.")
@click.option(
    "--resume", type=click.Path(path_type=Path), help="A file of JSON lines: pieces it has are not run again."
)
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Draw the samples to this PNG file (needs matplotlib)."
)
@_OUT
def soak(
    out: Path | None, minutes: float, seed: int, kills: bool, resume: Path | None, picture: Path | None
) -> None:  # fmt: skip
    """Random jobs, kills, cancels and documents for many minutes; memory, descriptors and disk must stay flat."""
    _say(f"seed {seed}")
    result = measure_soak(minutes, seed, kills, resume, _say)
    click.echo(write_result(out, result))
    if picture is not None:
        draw_soak(result, picture)
    if result["problems"] or result["growing"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
