"""Kill parts of a head at random while jobs run, and compare every token with those of an undisturbed run."""

from __future__ import annotations

import json
import random
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.bench.head_process import ROLES, HeadProcess, Role, until
from cluster.client.client import Client, Job
from cluster.client.errors import LongreachError
from cluster.client.models import JobEnded, TokenEvent
from cluster.client.retry import RetryPolicy
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.eval.haystack import build_haystack

_PATIENT = RetryPolicy(attempts=400, first_s=0.1, largest_s=0.5)  # over a minute without a head
_JOB_S = 600.0  # for one job, restarts included
_PAUSE_S = (0.3, 4.0)  # between a pipeline that is back and the next kill, at random

Tokens = tuple[tuple[int, ...], ...]  # of a job, by question


@dataclass
class Outcome:
    """What became of one job: how it ended, its tokens, and those that a follower saw."""

    kind: int
    state: str = ""
    error: str = ""
    tokens: Tokens = ()
    streamed: Tokens = ()
    restarts: int = 0


@dataclass
class _Load:
    """Jobs that are kept in flight, each submitted, followed and read by a thread of its own."""

    client: Client
    submit: Sequence[Callable[[Client, str], Job]]
    at_once: int
    outcomes: list[Outcome] = field(default_factory=list)
    stopping: threading.Event = field(default_factory=threading.Event)
    _next: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._threads = [threading.Thread(target=self._run, name=f"jobs {n}") for n in range(self.at_once)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Submit nothing more; return once every job has ended."""
        self.stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while not self.stopping.is_set():
            with self._lock:
                number = next(self._next)
            outcome = Outcome(number % len(self.submit))
            self.outcomes.append(outcome)
            try:
                run_job(self.client, self.submit[outcome.kind], f"kills-{number}", outcome)
            except LongreachError as error:
                outcome.state, outcome.error = "lost", str(error)


def run_job(client: Client, submit: Callable[[Client, str], Job], key: str, outcome: Outcome) -> None:
    """Submit one job, follow its stream and read its result into `outcome`."""
    job = submit(client, key)
    streamed: dict[int, list[int]] = {}
    for event in job.stream():
        if isinstance(event, TokenEvent):
            streamed.setdefault(event.question, []).append(event.token.token_id)
        elif isinstance(event, JobEnded):
            break
    job.wait(_JOB_S).refresh()
    outcome.state, outcome.error, outcome.restarts = job.state, job.error, job.data.restarts
    outcome.tokens = tuple(answer.token_ids for answer in job.answers)
    outcome.streamed = tuple(tuple(streamed.get(question, ())) for question in range(len(job.answers)))


def job_kinds(seed: int) -> list[Callable[[Client, str], Job]]:
    """Return functions that submit jobs of each kind: a long document, long answers, samples, several questions."""
    haystack = build_haystack(TextTokenizer.open(needle_dir()), 12_000, 2, seed, needle_dir())
    questions = [needle.question for needle in haystack.needles]
    short = "The code of old stone is 12345. " * 40

    def ids(length: int) -> list[int]:
        return random.Random(seed + length).choices(range(5, 4000), k=length)

    return [
        lambda client, key: client.submit(haystack.document, questions, max_tokens=24, idempotency_key=key),
        lambda client, key: client.submit(
            prompt="The code of dark river is", max_tokens=300, ignore_eos=True, temperature=0, idempotency_key=key
        ),
        lambda client, key: client.submit(
            prompt="Once", max_tokens=120, ignore_eos=True, temperature=0.8, seed=seed, idempotency_key=key
        ),
        lambda client, key: client.submit(short, ["What is the code?", "Of what?"], max_tokens=20, idempotency_key=key),
        lambda client, key: client.submit(token_ids=ids(3001), max_tokens=60, ignore_eos=True, idempotency_key=key),
        lambda client, key: client.submit(
            token_ids=ids(67), max_tokens=200, ignore_eos=True, temperature=1.0, top_p=0.9, seed=seed + 1,
            priority=1, idempotency_key=key,
        ),
    ]  # fmt: skip


@contextmanager
def head_over_needle(stages: int) -> Iterator[tuple[HeadProcess, Client]]:
    """Start a head over the demo model in a folder of its own; yields it and a patient client."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="lr-kills-") as root:
        folder = Path(root)
        settings = {
            "model": {
                "path": str(needle_dir()), "dtype": "float32", "max_model_len": "40k",
                "rope_scaling": {"rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 4096},
            },
            "cluster": {"pipeline_parallel_size": stages, "threads_per_actor": 1, "cpus_per_actor": 0.5},
            "prefill": {"max_num_batched_tokens": 256, "max_num_seqs": 4},
            "kv_cache": {"bytes": "256MiB"},
            "server": {"port": port},
            "data_dir": str(folder / "data"),
        }  # fmt: skip
        config = folder / "head.yaml"
        config.write_text(json.dumps(settings))
        head = HeadProcess(config, folder / "data", folder / "head.log")
        try:
            head.start()
            with Client(f"127.0.0.1:{port}", retries=_PATIENT) as client:
                yield head, client
        finally:
            head.close()


def kill_one(head: HeadProcess, client: Client, role: Role, draw: random.Random) -> float:
    """SIGKILL one process of a role and wait until the pipeline runs again; return the seconds that took."""
    victims = head.find(role)
    if not victims:
        raise RuntimeError(f"no process of the head is a {role}")
    before = {process.pid for process in head.find("stage")}
    victim = draw.choice(victims)
    began = time.monotonic()
    if role == "head":
        head.kill()
        began = time.monotonic()
        head.start()
    else:
        victim.kill()
        until(lambda: not before & {process.pid for process in head.find("stage")}, f"other stages after the {role}")
    until(lambda: all(stage.state == "running" for stage in client.status().stages), "a pipeline that runs again")
    return time.monotonic() - began


def measure_kills(kills: int, seed: int, stages: int, at_once: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run an undisturbed head, then one of which `kills` processes are killed; return how the jobs ended."""
    draw = random.Random(seed)
    kinds = job_kinds(seed)
    with head_over_needle(stages) as (_, client):
        expected = [Outcome(kind) for kind in range(len(kinds))]
        for kind, outcome in enumerate(expected):
            run_job(client, kinds[kind], f"undisturbed-{kind}", outcome)
    plan: list[Role] = [ROLES[n % len(ROLES)] for n in range(kills)]
    draw.shuffle(plan)
    done: list[dict[str, Any]] = []
    with head_over_needle(stages) as (head, client):
        load = _Load(client, kinds, at_once)
        load.start()
        try:
            for number, role in enumerate(plan, 1):
                pause = draw.uniform(*_PAUSE_S)
                time.sleep(pause)
                back = kill_one(head, client, role, draw)
                done.append({"role": role, "after_s": round(pause, 2), "back_s": round(back, 2)})
                say(f"kill {number} of {kills} (seed {seed}): {role}, back after {back:.1f} s")
        finally:
            load.finish()
        code = head.stop()
    return {"seed": seed, "kills": done, "exit_code": code} | judge(load.outcomes, [o.tokens for o in expected])


def judge(outcomes: Sequence[Outcome], expected: Sequence[Tokens]) -> dict[str, Any]:
    """Return how many jobs ended otherwise than in an undisturbed run, whose tokens by kind are `expected`."""
    states = Counter(outcome.state for outcome in outcomes)
    succeeded = [outcome for outcome in outcomes if outcome.state == "succeeded"]
    return {
        "jobs": len(outcomes),
        "lost": states["lost"],
        "given_up": states["failed"],
        "wrong_tokens": sum(outcome.tokens != expected[outcome.kind] for outcome in succeeded),
        "wrong_streams": sum(outcome.streamed != outcome.tokens for outcome in succeeded),
        "other_states": sum(n for state, n in states.items() if state not in ("lost", "failed", "succeeded")),
        "restarted": sum(outcome.restarts > 0 for outcome in outcomes),
        "largest_restarts": max((outcome.restarts for outcome in outcomes), default=0),
        "errors": sorted({outcome.error for outcome in outcomes if outcome.error})[:10],
    }
