"""Kill parts of a head at random while recorded jobs run, and judge what clients saw and what was computed again."""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from cluster.bench.faults.rig import CHUNK, FaultHead, Rig, Verdict, mixed_jobs
from cluster.bench.faults.store import BLOCK, StoredPrompts, store_settings
from cluster.bench.head_process import Role, until
from cluster.bench.history import History, Seen
from cluster.bench.recorder import Recorder, Refused
from cluster.bench.resumable import Results
from protos.jobs import jobs_pb2 as pb

Target = Literal["stage", "shard", "head", "raylet", "gcs"]
TARGETS: tuple[Target, ...] = ("stage", "shard", "head", "raylet", "gcs")
BATCH = 10  # kills of one head, then another one begins on an empty folder
_PAUSE_S = (0.5, 4.0)  # between a pipeline that is back and the next kill, at random
_CANCELLED = 0.1  # share of the jobs that are cancelled after a moment
_JOB_S = 600.0
_LONG = 6000  # tokens
_WITHOUT_REPAIRS = """
from cluster.cli.main import main
from cluster.engine.supervisor import PipelineSupervisor
PipelineSupervisor.repairs = False
main(prog_name="longreach")
"""


@dataclass
class Load:
    """Jobs that are kept in flight, each submitted, followed and read by a thread of its own, until `finish`."""

    address: str
    history: History
    seed: int
    at_once: int
    requests: dict[str, pb.SubmitRequest] = field(default_factory=dict)  # by kind: each job is one of its own
    broken: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stopping, self._lock, self._next = threading.Event(), threading.Lock(), 0
        self._threads = [threading.Thread(target=self._run, name=f"jobs {n}") for n in range(self.at_once)]

    def start(self) -> None:
        """Begin to submit."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Submit nothing more; return once every job has ended."""
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _take(self) -> tuple[str, pb.SubmitRequest, random.Random]:
        with self._lock:
            number, self._next = self._next, self._next + 1
            draw = random.Random(f"{self.seed} {number}")
            jobs = mixed_jobs(self.seed * 10_000 + 10 * number, draw.choice([1500, 3000, _LONG]))
            kind = draw.choice(["long", "long", *jobs])
            request = jobs[kind]
            request.priority = draw.choice([0, 0, 0, 1])
            name = f"{kind} {number}"
            self.requests[name] = request
            return name, request, draw

    def _run(self) -> None:
        while not self._stopping.is_set():
            kind, request, draw = self._take()
            try:
                with Recorder(self.address, self.history, kind) as client:
                    job = client.submit(kind, request, f"{kind} {os.urandom(4).hex()}")
                    if draw.random() < _CANCELLED:
                        time.sleep(draw.uniform(0, 2))
                        client.cancel(job)
                    client.follow(job)
                    client.wait(job, _JOB_S)
                    last = client.get(job).last_event
                    client.follow(job, draw.randint(0, last), grouped=False)
            except (Refused, TimeoutError) as error:
                self.broken.append(f"{kind}: {error}")


def kill_one(head: FaultHead, target: Target, draw: random.Random) -> tuple[float, float, str]:
    """SIGKILL what a target names and wait until all runs again.

    Returns:
        The moment, the seconds that took, and how it came back: "repair", "full restart" or "new head".
    """
    repairs = head.repairs()
    if target == "head":
        began = time.monotonic()
        head.kill()
        head.start()
    else:
        victims = _victims(head, target, draw)
        gone = {process.pid for process in victims}
        role: Role = "stage" if target == "shard" else target
        began = time.monotonic()
        for process in victims:
            process.kill()
        until(lambda: (now := {p.pid for p in head.find(role)}) and not now & gone, f"another {target}")
    stages, shards = head.layout
    until(lambda: len(head.stage_pids()) == stages * shards, "as many stage processes as before")
    head.wait_until_running()
    seconds = time.monotonic() - began
    how = "new head" if target == "head" else "repair" if head.repairs() > repairs else "full restart"
    return began, seconds, how


def _victims(head: FaultHead, target: Target, draw: random.Random) -> list[psutil.Process]:
    if target in ("raylet", "gcs"):
        return head.find("raylet" if target == "raylet" else "gcs")
    shards = head.shards()
    if target == "shard":
        return [draw.choice(list(shards.values()))]
    stage = draw.randrange(head.layout[0])
    return [process for (number, _), process in shards.items() if number == stage]


def recomputed(
    history: Sequence[Seen], killed_at: float, until_at: float, waiting: dict[str, int]
) -> dict[str, tuple[int, int]]:
    """Return (prompt tokens done before a kill, those of them computed again after it) of each question it restarted.

    Streams repeat old progress while nothing is computed, and show the new one before the new state. So progress is of
    the restarted job if its stream began after the kill, or its numbers are not those of before. What it has found is
    known when it computes: while stored KV is loaded, it shows what was in memory. One that is killed again before that
    is counted for the later kill.

    Args:
        until_at: the next kill; what comes later is counted for that one.
        waiting: by question, tokens done before an earlier kill, of those that had not begun to compute again at this
            one; replaced by those that have not at the next.
    """
    carried = dict(waiting)
    waiting.clear()
    before: dict[tuple[str, int], Seen] = {}
    restarts: dict[str, int] = defaultdict(int)
    restarted: set[str] = set()
    attached: dict[int, float] = {}
    for entry in (one for one in history if one.at < until_at):
        if entry.what == "attached":
            attached[entry.follower] = entry.at
        elif entry.what == "progress" and entry.at <= killed_at:
            before[entry.job, entry.question] = entry
        elif entry.what == "state" and entry.at <= killed_at:
            restarts[entry.job] = max(restarts[entry.job], entry.restarts)
        elif entry.what == "state" and entry.restarts > restarts[entry.job]:
            restarted.add(entry.job)
    names = {key: f"{key[0]}/{key[1]}" for key in before}
    done = {name: max(before[key].processed, carried.get(name, 0)) for key, name in names.items()}
    lost = {key for key, name in names.items() if done[name] and (key[0] in restarted or name in carried)}
    found: dict[str, tuple[int, int]] = {}
    for entry in history:
        key = entry.job, entry.question
        if entry.what != "progress" or not killed_at < entry.at < until_at or key not in lost:
            continue
        old, name = before[key], names[key]
        is_new = attached.get(entry.follower, 0.0) > killed_at or entry.cached != old.cached
        if (is_new or entry.processed < old.processed) and entry.processed > entry.cached:
            found.setdefault(name, (done[name], max(0, done[name] - entry.cached)))
    waiting.update((names[key], done[names[key]]) for key in lost if names[key] not in found)
    return found


def _batch(
    rig: Rig, number: int, targets: Sequence[Target], options: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """Run one head, kill what `targets` say one after the other, and judge what its clients saw."""
    seed = options["seed"] * 1000 + number
    draw, history = random.Random(seed), History()
    stages, shards = options["stages"], options["shards"]
    store = rig.new_folder() / "kv"
    kills: list[dict[str, Any]] = []
    moments: list[tuple[float, StoredPrompts]] = []
    with rig.fresh(stages, shards, **store_settings(store)) as head:
        if options["full_restarts"]:
            head.command = [sys.executable, "-c", _WITHOUT_REPAIRS]
        head.start()
        stored = StoredPrompts(store, stages * shards)
        load = Load(head.address, history, seed, options["at_once"])
        load.start()
        try:
            for target in targets:
                pause = draw.uniform(*_PAUSE_S)
                time.sleep(pause)
                at_kill = stored.now()
                began, back, how = kill_one(head, target, draw)
                moments.append((began, at_kill))
                kills.append({"target": target, "after_s": round(pause, 2), "back_s": round(back, 2), "how": how})
                say(f"batch {number}, seed {seed}: {target}, back after {back:.1f} s by a {how}")
        finally:
            load.finish()
        code = head.stop()
        began = time.monotonic()
        head.start()
        head.wait_until_running()
        cold = time.monotonic() - began
        head.stop()
        prompts = stored.prompts()
    waiting: dict[str, int] = {}
    ids = {entry.job: list(load.requests[entry.kind].token_ids.ids) for entry in history.of("submitted")}
    for index, (began, at_kill) in enumerate(moments):
        later = moments[index + 1][0] if index + 1 < len(moments) else float("inf")
        affected = recomputed(list(history), began, later, waiting)
        again = sum(tokens for _, tokens in affected.values())
        unstored = sum(
            max(0, before // BLOCK * BLOCK - at_kill.prefix(ids[name.split("/")[0]], prompts))
            for name, (before, _) in affected.items()
        )
        bound = len(affected) * (BLOCK + CHUNK * stages) + unstored
        kills[index] |= {"restarted": len(affected), "recomputed": again, "unstored": unstored, "bound": bound}
    verdict = rig.judge(Verdict(), history, load.requests, most_restarts=len(targets))
    exits = [] if code == 0 else [f"the head ended with {code}"]
    return {
        "batch": number, "seed": seed, "kills": kills, "cold_start_s": round(cold, 2),
        "problems": verdict.problems + load.broken + exits, "facts": verdict.facts,
    }  # fmt: skip


def measure_kills(
    kills: int, seed: int, stages: int, shards: int, at_once: int, resume: Path | None, say: Callable[[str], None],
    full_restarts: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Kill `kills` processes in batches and return how jobs, tokens and times came out of it.

    Args:
        resume: a file of JSON lines; batches that it has are not run again.
        full_restarts: never replace stages alone: everything is started anew after each failure.
    """
    options: dict[str, Any] = {"seed": seed, "stages": stages, "shards": shards, "at_once": at_once}
    options["full_restarts"] = full_restarts
    results = Results(resume, {"what": "kills", "kills": kills} | options)
    plan = [TARGETS[n % len(TARGETS)] for n in range(kills)]
    random.Random(seed).shuffle(plan)
    done = {row["batch"] for row in results.rows}
    with tempfile.TemporaryDirectory(prefix="lr-kills-") as folder:
        rig = Rig(Path(folder))
        try:
            for number in range(-(-kills // BATCH)):
                if number not in done:
                    results.add(_batch(rig, number, plan[number * BATCH : (number + 1) * BATCH], options, say))
        finally:
            rig.close()
    return options | summarize(results.rows)


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the report over all batches."""
    kills = [kill for row in rows for kill in row["kills"]]
    back: dict[str, list[float]] = defaultdict(list)
    by_how: dict[str, list[float]] = defaultdict(list)
    again: dict[str, list[int]] = defaultdict(list)
    for kill in kills:
        back[kill["target"]].append(kill["back_s"])
        by_how[kill["how"]].append(kill["back_s"])
        again[kill["target"]].append(kill["recomputed"])
    return {
        "kills": len(kills),
        "jobs": sum(row["facts"].get("jobs", 0) for row in rows),
        "tokens": sum(row["facts"].get("tokens", 0) for row in rows),
        "problems": [problem for row in rows for problem in row["problems"]],
        "recovered_by": {
            how: {"count": len(seconds), "median_s": round(statistics.median(seconds), 2), "max_s": max(seconds)}
            for how, seconds in sorted(by_how.items())
        },
        "recovery_s": {target: round(statistics.median(seconds), 2) for target, seconds in sorted(back.items())},
        "cold_start_s": round(statistics.median([row["cold_start_s"] for row in rows]), 2) if rows else None,
        "recomputed_median": {target: statistics.median(tokens) for target, tokens in sorted(again.items())},
        "unstored_median": statistics.median([kill["unstored"] for kill in kills]) if kills else None,
        "recomputed_largest": max((kill["recomputed"] for kill in kills), default=0),
        "beyond_bound": [kill for kill in kills if kill["recomputed"] > kill["bound"]],
        "batches": list(rows),
    }
