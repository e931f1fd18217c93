"""Faults of what clients do: too much, too slowly, twice, and leaving in the middle."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.bench.faults.rig import FaultHead, Rig, Running, Verdict, mixed_jobs, random_prompt
from cluster.bench.head_process import until
from cluster.bench.history import History
from cluster.bench.recorder import Recorder
from protos.jobs import jobs_pb2 as pb

_FINAL = (pb.SUCCEEDED, pb.FAILED, pb.CANCELLED)


def more_jobs_than_memory(rig: Rig, seed: int) -> Verdict:
    """Jobs that need several times the KV there is run as room comes; one that never fits is refused with numbers."""
    history, verdict = History(), Verdict()
    head = rig.head()
    with head.client() as status:
        room = status.status().kv_tokens
        answer = room // 4  # tokens reserved for an answer: three such jobs fit beside each other, four do not
        count = 24 if rig.full else 8
        wide = {f"wide {n}": random_prompt(seed * 60 + n, 700, max_tokens=answer) for n in range(count)}
        most = 0
        with Recorder(head.address, history, "canceller") as client, Running(head.address, history, wide, seed) as jobs:
            left = set(wide)
            while left:  # nobody waits for answers of thousands of tokens
                most = max(most, status.status().running)
                for kind in [kind for kind in left if _tokens(history, jobs.ids[kind]) >= 10]:
                    client.cancel(jobs.ids[kind])
                    left.discard(kind)
                time.sleep(0.05)
        usage = status.status().kv_usage
    _refused(head, verdict, random_prompt(seed, 39_000, max_tokens=20_000), "max_model_len")
    verdict.facts |= {"kv_tokens": room, "asked_tokens": count * (700 + answer), "most_at_once": most}
    verdict.expect(most <= 3, f"{most} jobs ran where memory is for 3")
    verdict.expect(usage <= 1, f"the memory is used to {usage:.0%}")
    compared = 500 if rig.full else 200  # tokens; jobs are cancelled long before
    return rig.judge(
        verdict, history, {k: random_prompt(seed * 60 + n, 700, max_tokens=compared) for n, k in enumerate(wide)}
    )


def _tokens(history: History, job: str) -> int:
    return max((entry.number for entry in history.of("token") if entry.job == job), default=0)


def _refused(head: FaultHead, verdict: Verdict, request: pb.SubmitRequest, part: str) -> None:
    history = History()
    with Recorder(head.address, history, "refused", patience_s=0) as client:
        try:
            client.submit("refused", request, "")
        except Exception:  # noqa: BLE001 - judged by the history
            pass
    errors = history.of("error")
    shown = [(error.state, error.text) for error in errors]
    is_clear = len(errors) == 1 and errors[0].state == "INVALID_ARGUMENT" and part in errors[0].text
    verdict.expect(is_clear, f"a job that can never fit: {shown}")


def slow_reader(rig: Rig, seed: int) -> Verdict:
    """Clients that read a token at a time, or never, get everything in the end and hold up nobody."""
    history, verdict = History(), Verdict()
    head = rig.head()
    long = random_prompt(seed, 67, max_tokens=600)
    requests = {"read slowly": long} | mixed_jobs(seed, 1500)
    with Recorder(head.address, history, "slow") as slow, Recorder(head.address, history, "silent") as silent:
        job = slow.submit("read slowly", long, f"slow {seed}")
        idle = silent._stub.Stream(pb.StreamRequest(id=job))  # nobody reads it
        reader = threading.Thread(target=slow.follow, args=(job,), kwargs={"grouped": False, "pause_s": 0.02})
        reader.start()
        with Running(head.address, history, mixed_jobs(seed, 1500), seed):
            pass
        began = time.monotonic()
        slow.wait(job)
        verdict.facts["job_ended_before_its_reader"] = reader.is_alive()
        reader.join(120)
        verdict.facts["reader_behind_s"] = round(time.monotonic() - began, 1)
        verdict.expect(not reader.is_alive(), "the slow reader did not come to the end")
        idle.cancel()
    return rig.judge(verdict, history, requests)


def disconnect_in_prefill(rig: Rig, seed: int) -> Verdict:
    """A client that hangs up while its prompt is read: the attached job ends within a few chunks, others go on."""
    draw, history, verdict = random.Random(seed), History(), Verdict()
    head = rig.head()
    request = random_prompt(seed, 9000)
    attached = pb.SubmitRequest()
    attached.CopyFrom(request)
    attached.attached = True
    requests = {"left": request, "again": request} | mixed_jobs(seed, 1500)
    at = draw.randrange(256, 5000)
    with Recorder(head.address, history, "watcher") as watcher:
        with Running(head.address, history, mixed_jobs(seed, 1500), seed):
            leaver = Recorder(head.address, history, "leaver")
            job = leaver.submit("left", attached, f"left {seed}")
            leaver.follow(job, leave=lambda: _processed(history, job) >= at)
            leaver.close()
            began = time.monotonic()
            until(lambda: watcher.get(job).state in _FINAL, "the end of the job that nobody follows", 30)
            verdict.facts["ended_after_s"] = round(time.monotonic() - began, 2)
        ended = watcher.get(job)
        verdict.expect(ended.state == pb.CANCELLED, f"it ended as {pb.State.Name(ended.state)}")
        again = watcher.submit("again", request, f"again {seed}")
        watcher.follow(again)
        cached = watcher.get(again).answers[0].cached_tokens
        verdict.facts |= {"left_at": at, "cached_of_the_retry": cached}
        verdict.expect(cached < 8700, "the whole prompt was read for nobody")
        verdict.expect(cached >= at // 2, f"the retry found {cached} tokens of {at} that had been read")
    return rig.judge(verdict, history, requests)


def _processed(history: History, job: str) -> int:
    return max((entry.processed for entry in history.of("progress") if entry.job == job), default=0)


def cancel_in_every_state(rig: Rig, seed: int) -> Verdict:
    """Cancel a job that is queued, prefilling, decoding, recovering, cancelled, ended: no token comes afterwards."""
    history, verdict = History(), Verdict()
    head = rig.head()
    with Recorder(head.address, history, "a") as client, Recorder(head.address, history, "b") as other:
        answer, long = (400, 8000) if rig.full else (200, 5000)  # tokens; the reference computes them all
        requests = {f"filler {n}": random_prompt(seed * 70 + n, 64, max_tokens=answer) for n in range(4)}
        requests |= {
            "queued": random_prompt(seed, 900), "prefilling": random_prompt(seed + 1, long),
            "decoding": random_prompt(seed + 2, 64, max_tokens=answer),
            "recovering": random_prompt(seed + 3, long), "ended": random_prompt(seed + 4, 64),
        }  # fmt: skip
        ids: dict[str, str] = {}
        followers = []

        def submit(kind: str) -> str:
            ids[kind] = client.submit(kind, requests[kind], f"{kind} {seed}")
            followers.append(threading.Thread(target=other.follow, args=(ids[kind],)))
            followers[-1].start()
            return ids[kind]

        def cancel(kind: str, state: int) -> None:
            until(lambda: client.get(ids[kind]).state in (state, *_FINAL), f"{kind}", 60)
            before = client.get(ids[kind]).state
            verdict.facts[pb.State.Name(before)] = pb.State.Name(client.cancel(ids[kind]).state)

        submit("ended")
        client.wait(ids["ended"])
        for number in range(4):  # as many as run at a time
            submit(f"filler {number}")
        submit("queued")
        cancel("queued", pb.QUEUED)
        for number in range(4):
            cancel(f"filler {number}", pb.DECODING)
        submit("prefilling")
        cancel("prefilling", pb.PREFILLING)
        submit("decoding")
        cancel("decoding", pb.DECODING)
        submit("recovering")
        until(lambda: _processed(history, ids["recovering"]) > 500, "a prefill")
        head.find("stage")[0].kill()
        until(lambda: client.get(ids["recovering"]).state != pb.PREFILLING, "a job that is no longer read")
        cancel("recovering", pb.RECOVERING)
        for kind in ("ended", "queued"):
            cancel(kind, pb.SUCCEEDED)
        for thread in followers:
            thread.join(60)
        for job in ids.values():
            client.wait(job, 60)
    verdict.expect(verdict.facts["SUCCEEDED"] == "SUCCEEDED", "a job that had succeeded was cancelled")
    verdict.expect(len(verdict.facts) == 6, f"only these states were met: {sorted(verdict.facts)}")
    head.wait_until_running()
    return rig.judge(verdict, history, requests)


def parallel_duplicates(rig: Rig, seed: int) -> Verdict:
    """50 clients submit the same request under the same key at once: one job; another request: ALREADY_EXISTS."""
    history, verdict = History(), Verdict()
    head = rig.head()
    request = random_prompt(seed, 500)
    barrier = threading.Barrier(50)

    def submit(number: int) -> str:
        with Recorder(head.address, history, f"client {number}") as client:
            barrier.wait()
            job = client.submit("same", request, f"same {seed}")
            client.follow(job)
            client.wait(job)
            return job

    with ThreadPoolExecutor(50) as threads:
        jobs = set(threads.map(submit, range(50)))
    verdict.expect(len(jobs) == 1, f"{len(jobs)} jobs of one key")
    others = History()
    with Recorder(head.address, others, "other", patience_s=0) as client:
        try:
            client.submit("other", random_prompt(seed + 1, 500), f"same {seed}")
        except Exception:  # noqa: BLE001 - judged by its history
            pass
    states = [error.state for error in others.of("error")]
    verdict.expect(states == ["ALREADY_EXISTS"], f"another request under the key: {states or 'accepted'}")
    return rig.judge(verdict, history, {"same": request})


def long_job_beside_short_ones(rig: Rig, seed: int) -> Verdict:
    """100 short jobs while a prompt of a million tokens is read: each has its first token in bounded time."""
    history, verdict = History(), Verdict()
    draw = random.Random(seed)
    sections: dict[str, Any] = {}
    if rig.full:
        sections = {
            "model": {"max_model_len": "1010k", "rope_scaling": None, "config_file": "config_1m.json"},
            "sparse": {"enabled": True, "n_vertical": 1000, "n_slash": 100},  # as the demo; short ones are dense
            "kv_cache": {"bytes": "5GiB"},
        }
    head = rig.head(2, 1, **sections)
    length, count, tokens = (1_000_000, 100, 2) if rig.full else (20_000, 20, 8)  # each token takes a chunk's time
    long = random_prompt(seed, length)
    short = {
        f"short {n}": random_prompt(seed * 1000 + n, draw.randint(20, 400), max_tokens=tokens) for n in range(count)
    }
    waits: list[float] = []
    with Recorder(head.address, history, "long") as client, Recorder(head.address, history, "short") as other:
        job = client.submit("long", long, f"long {seed}")
        follower = threading.Thread(target=client.follow, args=(job,))
        follower.start()
        until(lambda: _processed(history, job) > 0, "a prefill")
        for kind, request in short.items():
            began = time.monotonic()
            mine = other.submit(kind, request, f"{kind} {seed}")
            other.follow(mine, leave=lambda mine=mine: any(e.job == mine for e in history.of("token")))  # type: ignore[misc]
            waits.append(time.monotonic() - began)
            other.wait(mine)
        share = _processed(history, job) / length
        if rig.full:  # the short ones are what this is about; an hour of reading is left
            client.cancel(job)
        client.wait(job)
        follower.join(60)
    waits.sort()
    verdict.facts |= {
        "length": length, "short_jobs": count, "read_of_the_long_one": round(share, 3),
        "first_token_s": {"median": round(waits[count // 2], 2), "max": round(waits[-1], 2)},
    }  # fmt: skip
    verdict.expect(waits[count // 2] < 30, f"a short job waits {waits[count // 2]:.1f} s (median)")
    return rig.judge(verdict, history, short if rig.full else short | {"long": long}, sections)
