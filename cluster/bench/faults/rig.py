"""What a fault is given: heads in processes of their own, an undisturbed head, and jobs that are recorded."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil

from cluster.bench.head_process import HeadProcess, until
from cluster.bench.history import History
from cluster.bench.recorder import Recorder, Refused
from cluster.bench.verdicts import Expected, Tokens, judge
from cluster.client.client import Client
from cluster.client.requests import SubmitOptions, build_submit
from cluster.client.retry import RetryPolicy
from cluster.tools.assets import needle_dir
from protos.jobs import jobs_pb2 as pb

PATIENT = RetryPolicy(attempts=400, first_s=0.1, largest_s=0.5)  # over a minute without a head
CHUNK = 256  # tokens of a step
_KV_BYTES = 192 << 20  # of all shards together: some 48,000 tokens
_JOB_S = 300.0

_SOCKET = re.compile(r"/s(\d+)r(\d+)e\d+\.sock$")

Requests = Mapping[str, pb.SubmitRequest]  # by kind


def free_port() -> int:
    """Return a TCP port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def head_settings(folder: Path, stages: int, shards: int, port: int) -> dict[str, Any]:
    """Return the configuration of a head over the demo model in float32, whose data are in `folder`."""
    return {
        "model": {
            "path": str(needle_dir()), "dtype": "float32", "max_model_len": "40k",
            "rope_scaling": {"rope_type": "yarn", "factor": 10.0, "original_max_position_embeddings": 4096},
        },
        "cluster": {
            "pipeline_parallel_size": stages, "expert_parallel_size": shards, "threads_per_actor": 1,
            "cpus_per_actor": 0.5,
        },
        "prefill": {"max_num_batched_tokens": CHUNK, "max_num_seqs": 4},
        "kv_cache": {"bytes": _KV_BYTES // (stages * shards)},
        "server": {"port": port},
        "data_dir": str(folder / "data"),
    }  # fmt: skip


def merged(settings: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of sections replaced one by one."""
    result = dict(settings)
    for name, value in changes.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return result


class FaultHead(HeadProcess):
    """A head in a folder of its own."""

    def __init__(self, folder: Path, stages: int = 2, shards: int = 1, **sections: Any) -> None:
        """Args: `sections` of the configuration, or `data_dir`, that differ from `head_settings`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port, self.layout = folder, free_port(), (stages, shards)
        self.settings = merged(head_settings(folder, stages, shards, self.port), sections)
        super().__init__(folder / "head.yaml", Path(self.settings["data_dir"]), folder / "head.log")
        self.write()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def write(self) -> None:
        """Write the configuration of the next start."""
        self.config.write_text(json.dumps(self.settings))

    def client(self, **options: Any) -> Client:
        """Return a patient client."""
        return Client(self.address, retries=PATIENT, **options)

    def wait_until_running(self) -> None:
        """Wait until all shards compute again."""
        count = self.layout[0] * self.layout[1]

        def runs() -> bool:
            with self.client() as client:
                states = [stage.state for stage in client.status().stages]
            return len(states) == count and set(states) == {"running"}

        until(runs, "a pipeline that runs")

    def repairs(self) -> int:
        """Return how often only some stages were replaced."""
        with self.client() as client:
            return client.status().repairs

    def shards(self) -> dict[tuple[int, int], psutil.Process]:
        """Return the stage processes by stage and rank, known by the sockets they listen at."""
        found = {}
        for process in self.find("stage"):
            with contextlib.suppress(psutil.Error):
                for connection in process.net_connections("unix"):
                    if match := _SOCKET.search(str(connection.laddr)):
                        found[int(match[1]), int(match[2])] = process
        if len(found) != self.layout[0] * self.layout[1]:
            raise RuntimeError(f"only the shards {sorted(found)} listen")
        return found

    def stage_pids(self) -> set[int]:
        return {process.pid for process in self.find("stage")}


@dataclass
class Verdict:
    """What a fault showed: facts for the report, and every broken promise in a line."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expect(self, condition: object, problem: str) -> None:
        """Note a problem unless the condition holds."""
        if not condition:
            self.problems.append(problem)


class Rig:
    """Heads and references of one run of faults. Close it at the end."""

    def __init__(self, folder: Path, *, full: bool = True) -> None:
        """Args: `full`: long documents and every victim; otherwise what continuous integration has time for."""
        self.folder = folder
        self.full = full
        self._count = 0
        self._shared: dict[str, FaultHead] = {}  # by their settings, the last used one last
        self._references: dict[str, FaultHead] = {}  # by what differs from the usual settings
        self._known: dict[tuple[str, bytes], Tokens] = {}

    def close(self) -> None:
        """Kill what runs."""
        for head in (*self._shared.values(), *self._references.values()):
            head.close()

    def head(self, stages: int = 2, shards: int = 1, **sections: Any) -> FaultHead:
        """Return a running head of these settings, that of an earlier fault where it is well; two are kept."""
        wanted = json.dumps([stages, shards, sections], sort_keys=True)
        head = self._shared.pop(wanted, None)
        if head is not None and not head.is_running:
            head.close()
            head = None
        while len(self._shared) > 1:
            self._shared.pop(next(iter(self._shared))).close()
        if head is None:
            head = FaultHead(self.new_folder(), stages, shards, **sections)
        self._shared[wanted] = head
        if not head.is_running:
            head.start()
        if "security" not in sections:
            head.wait_until_running()
        return head

    @contextlib.contextmanager
    def fresh(self, stages: int = 1, shards: int = 1, **sections: Any) -> Iterator[FaultHead]:
        """Yield a head that has not been started, and kill what is left of it."""
        head = FaultHead(self.new_folder(), stages, shards, **sections)
        try:
            yield head
        finally:
            head.close()

    def new_folder(self) -> Path:
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        return folder

    def tokens(self, requests: Requests, sections: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Tokens]:
        """Return the tokens of requests by kind, as an undisturbed head of one process gives them.

        Args:
            sections: of its configuration, that differ from the usual ones.
        """
        settings = json.dumps(dict(sections), sort_keys=True)
        keys = {kind: (settings, r.SerializeToString(deterministic=True)) for kind, r in requests.items()}
        missing = {kind: r for kind, r in requests.items() if keys[kind] not in self._known}
        if missing:
            if settings not in self._references:
                head = FaultHead(self.new_folder(), 1, 1, **{**sections, "kv_store": {"enabled": False}})
                self._references[settings] = head
                head.start()
            with Recorder(self._references[settings].address, History(), "reference") as client:
                ids = {kind: client.submit(kind, r, os.urandom(8).hex()) for kind, r in missing.items()}
                for kind, job_id in ids.items():
                    job = client.wait(job_id)
                    if job.state != pb.SUCCEEDED:
                        raise RuntimeError(f"undisturbed {kind} ended otherwise: {job.error}")
                    self._known[keys[kind]] = tuple(tuple(answer.token_ids) for answer in job.answers)
        return {kind: self._known[keys[kind]] for kind in requests}

    def judge(
        self, verdict: Verdict, history: History, requests: Requests,
        sections: Mapping[str, Any] = MappingProxyType({}), **allowed: Any,
    ) -> Verdict:  # fmt: skip
        """Add every violation of a history to a verdict.

        Args:
            sections: as of `tokens`.
            allowed: see `Expected`.
        """
        found = judge(history, Expected(self.tokens(requests, sections), **allowed))
        verdict.problems += [str(violation) for violation in found[:20]]
        verdict.facts |= {
            "jobs": len({entry.job for entry in history.of("submitted")}),
            "tokens": len(history.of("token")),
            "restarts": max((entry.restarts for entry in history.of("state")), default=0),
            "errors": sorted({f"{entry.kind} {entry.state}" for entry in history.of("error")}),
        }
        return verdict


def request(document: str | None = None, questions: Sequence[str] | None = None, **options: Any) -> pb.SubmitRequest:
    """Return a submission, without a key."""
    values: SubmitOptions = options  # type: ignore[assignment]
    message = build_submit(document, questions, values)
    message.ClearField("idempotency_key")
    return message


def random_prompt(variant: int, length: int, **options: Any) -> pb.SubmitRequest:
    """Return a greedy job about random token ids, which no other variant shares."""
    ids = random.Random(f"prompt {variant}").choices(range(5, 4000), k=length)
    return request(token_ids=ids, **{"max_tokens": 24, "ignore_eos": True, "temperature": 0.0} | options)


def mixed_jobs(seed: int, length: int = 4000) -> dict[str, pb.SubmitRequest]:
    """Return a job of each kind: a long prompt, a text with questions, a long answer, samples."""
    text = f"Note {seed}. " + f"The code of old stone is {10_000 + seed % 90_000}. " * 60
    return {
        "long": random_prompt(seed, length),
        "questions": request(text, ["What is the code?", "Of what?"], max_tokens=16, temperature=0.0),
        "answer": request(prompt=f"The code of river {seed} is", max_tokens=120, ignore_eos=True, temperature=0.0),
        "samples": random_prompt(seed + 1, 67, max_tokens=60, temperature=1.0, top_p=0.9, seed=seed),
        "prompt": request(prompt="Once", max_tokens=40, ignore_eos=True, temperature=0.8, seed=seed),
    }


class Running:
    """Jobs that clients submit, follow and read, each in a thread of its own; afterwards another client re-reads them.

    >>> with Running(head.address, history, mixed_jobs(1), seed=1) as running:
    ...     running.until_progress("long", 1000)
    ...     head.find("stage")[0].kill()
    """

    def __init__(self, address: str, history: History, requests: Requests, seed: int, key: str = "") -> None:
        self._history = history
        self._address = address
        self._key = key
        self._draw = random.Random(f"running {seed}")
        self._requests = requests
        self.ids: dict[str, str] = {}
        self.failed: list[str] = []
        self._threads = [
            threading.Thread(target=self._run, args=(kind, f"{seed}-{kind}-{os.urandom(4).hex()}", self._draw.random()))
            for kind in requests
        ]

    def __enter__(self) -> Running:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.ids) == len(self._requests) or self.failed, "accepted jobs")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for thread in self._threads:
            thread.join(_JOB_S)
            if thread.is_alive():
                self.failed.append(f"{thread.name} did not end within {_JOB_S:g} s")
        if kind is None and self.failed:
            raise RuntimeError("; ".join(self.failed))

    def until_progress(self, kind: str, tokens: int) -> None:
        """Wait until so many tokens of a job's prompt are done, or the job has ended."""
        job = self.ids[kind]
        until(lambda: self._has(job, "progress", lambda e: e.processed >= tokens) or self.ended(kind), "a prefill")

    def until_tokens(self, kind: str, count: int) -> None:
        """Wait until a job has so many tokens, or has ended."""
        job = self.ids[kind]
        until(lambda: self._has(job, "token", lambda e: e.number >= count) or self.ended(kind), "tokens")

    def ended(self, kind: str) -> bool:
        return self._has(self.ids[kind], "answer", lambda e: True)

    def _has(self, job: str, what: Any, fits: Callable[[Any], bool]) -> bool:
        return any(entry.job == job and fits(entry) for entry in self._history.of(what))

    def _run(self, kind: str, key: str, draw: float) -> None:
        try:
            with (
                Recorder(self._address, self._history, f"a-{kind}", self._key) as one,
                Recorder(self._address, self._history, f"b-{kind}", self._key) as other,
            ):
                job = self.ids[kind] = one.submit(kind, self._requests[kind], key)
                second = threading.Thread(target=self._follow_late, args=(other, job, draw))
                second.start()
                one.follow(job)
                one.wait(job, _JOB_S)
                second.join(_JOB_S)
                last = other.get(job).last_event
                other.follow(job, int(draw * (last + 1)), grouped=False)
        except (Refused, TimeoutError) as error:
            self.failed.append(f"{kind}: {error}")

    def _follow_late(self, client: Recorder, job: str, draw: float) -> None:
        """Attach in the middle, after a token that the first follower has seen."""
        time.sleep(draw)
        seen = max((e.number for e in self._history.of("token") if e.job == job), default=0)
        with contextlib.suppress(Refused):  # it is in the history
            client.follow(job, int(draw * (seen + 1)) if seen else 0)
