"""Scaling: one document over more stages and shards, a document that grows with them, and jobs beside each other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import product
from typing import Any

from cluster.bench.speed.head import Layout, MeasuredHead
from cluster.bench.speed.repeats import figure
from cluster.bench.speed.run import Run
from cluster.bench.timeline.figures import bubbles, expert_load, traffic
from cluster.bench.timeline.trace import TraceLog, as_json, chunk_times

ONE = Layout(1, 1)


def measure_scaling(run: Run) -> None:
    """Add the rows that the settings ask for: strong, weak, throughput; then efficiencies, as far as they are known.

    In every round the layouts are started and measured one after the other, so that a machine that becomes slower or
    faster with the hours does so for all of them.
    """
    layouts = [Layout(*pair) for pair in run.bench.settings.layouts]
    wanted = set(run.bench.settings.scaling)
    run.total = _count(run, layouts, wanted)
    rounds = range(run.bench.settings.rounds)
    for mode, _, layout in product(run.bench.settings.modes, rounds, layouts):
        if prompts := _prompts(run, layout, layouts, wanted):
            _measure_prompts(run, mode, layout, prompts)
        if "throughput" in wanted:
            _measure_jobs(run, mode, layout)
    add_efficiencies(run.report["rows"])


def _prompts(run: Run, layout: Layout, layouts: list[Layout], wanted: set[Any]) -> dict[str, list[int]]:
    """Return the prompt lengths of a layout by kind; that of one process are also what weak scaling compares with."""
    settings, found = run.bench.settings, {}
    if "strong" in wanted:
        found["strong"] = list(settings.lengths)
    if "weak" in wanted:
        base = settings.weak_length
        found["weak"] = [base * layout.processes]
        if layout == ONE:
            found["weak"] = sorted({base * other.processes for other in layouts})
    return found


def _count(run: Run, layouts: list[Layout], wanted: set[Any]) -> int:
    prompts = sum(len(lengths) for at in layouts for lengths in _prompts(run, at, layouts, wanted).values())
    jobs = len(run.bench.settings.jobs) * len(layouts) if "throughput" in wanted else 0
    return len(run.bench.settings.modes) * (prompts + jobs)


def _measure_prompts(run: Run, mode: str, layout: Layout, prompts: Mapping[str, list[int]]) -> None:
    with run.head(mode, layout, max(map(max, prompts.values())) + 2, trace=True) as head:
        run.note_model(head)
        for kind, lengths in prompts.items():
            for length in lengths:
                _prompt_row(run, head, mode, layout, kind, length)


def _prompt_row(run: Run, head: MeasuredHead, mode: str, layout: Layout, kind: str, length: int) -> None:
    log = TraceLog(head.runtime.engine, head.deployment.shards)

    def measure(number: int) -> Mapping[str, Any]:
        ids = head.prompt(length, run.seed(len(kind), length, number))
        log.clear()
        seconds = head.serve(ids, 2).first_token_s
        return {"first_token_s": seconds, "prefill_tokens_per_s": length / seconds}

    def timeline() -> Mapping[str, Any]:
        results = log.results()
        chunks = chunk_times([plan for plan, _ in log.chunks()], results)
        found = {
            "bubbles": bubbles(chunks), "traffic": traffic(chunks), "timeline": as_json(chunks),
            "experts": expert_load(results, head.deployment.shards),
        }  # fmt: skip
        return {name: value for name, value in found.items() if value}

    threads = head.deployment.config.cluster.threads(run.report["machine"]["cores"])
    key = {
        "kind": kind, "mode": mode, "stages": layout.stages, "shards": layout.shards, "length": length,
        "threads": threads, "oversubscribed": layout.processes * threads > run.report["machine"]["cores"],
    }  # fmt: skip
    run.row(key, measure, timeline)
    log.close()


def _measure_jobs(run: Run, mode: str, layout: Layout) -> None:
    """Measure jobs that are submitted together."""
    settings = run.bench.settings
    length, tokens = settings.job_length, settings.tokens
    room = max(settings.jobs) * (length + tokens)
    with run.head(mode, layout, room, max_len=length + tokens, trace=False) as head:
        run.note_model(head)
        for jobs in settings.jobs:

            def measure(number: int, jobs: int = jobs) -> Mapping[str, Any]:
                prompts = [head.prompt(length, run.seed(jobs, number, job)) for job in range(jobs)]
                began = time.perf_counter()
                running = [head.client.submit(token_ids=ids, max_tokens=tokens, ignore_eos=True) for ids in prompts]
                for job in running:
                    job.wait()
                seconds = time.perf_counter() - began
                return {
                    "total_s": seconds, "jobs_per_hour": 3600 * jobs / seconds,
                    "tokens_per_s": jobs * (length + tokens) / seconds,
                }  # fmt: skip

            run.row({"kind": "throughput", "mode": mode, "stages": layout.stages, "shards": layout.shards,
                     "length": length, "tokens": tokens, "jobs": jobs}, measure)  # fmt: skip


def add_efficiencies(rows: list[dict[str, Any]]) -> None:
    """Add `speedup` and `efficiency` to every row that has one of a single process, or of one job, to compare with.

    Strong and weak: time of one process over time of n on the same document, and that over n. Weak scaling compares
    the grown document too, since attention grows faster than its length; `growth` is the time beside the first one's.
    Throughput: tokens a second beside those of one job.
    """
    single = {_case(row): row for row in rows if _is_single(row)}
    for row in rows:
        base = single.get(_case(row))
        name = "tokens_per_s" if row["kind"] == "throughput" else "first_token_s"
        if base is None or not (own := figure(row, name)) or not (first := figure(base, name)):
            continue
        if row["kind"] == "throughput":
            row["speedup"] = round(own / first, 4)
            continue
        processes = row["stages"] * row["shards"]
        row["speedup"] = round(first / own, 4)
        row["efficiency"] = round(first / own / processes, 4)
        if row["kind"] == "weak" and (least := _shortest(rows, row)):
            row["growth"] = round(own / least, 4)


def _is_single(row: Mapping[str, Any]) -> bool:
    size = row["jobs"] if row["kind"] == "throughput" else row["stages"] * row["shards"]
    return int(size) == 1


def _case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what rows that are compared have in common."""
    if row["kind"] == "throughput":
        return "throughput", row["mode"], row["length"], row["stages"], row["shards"]
    return row["kind"], row["mode"], row["length"]


def _shortest(rows: list[dict[str, Any]], row: Mapping[str, Any]) -> float | None:
    """Return the seconds of one process on the first document of weak scaling."""
    alike = [one for one in rows if one["kind"] == "weak" and one["mode"] == row["mode"] and _is_single(one)]
    return figure(min(alike, key=lambda one: int(one["length"])), "first_token_s") if alike else None
