"""Faults of processes: killed, slow, hung."""

from __future__ import annotations

import random
import threading
import time

import psutil

from cluster.bench.faults.rig import FaultHead, Requests, Rig, Running, Verdict, mixed_jobs, random_prompt
from cluster.bench.head_process import until
from cluster.bench.history import History

_LONG = 6000  # tokens of a prompt that is long enough to be interrupted


def _victims(head: FaultHead) -> list[psutil.Process]:
    """Return the stage processes in the order they were started."""
    return sorted(head.find("stage"), key=lambda process: process.pid)


def _kill_each_in_prefill(rig: Rig, seed: int, shards: int) -> Verdict:
    """Kill stage processes one after the other, each while a prompt of its own is being read, at a random chunk."""
    draw, verdict, history = random.Random(seed), Verdict(), History()
    requests: dict[str, Requests] = {}
    head = rig.head(2, shards)
    count = 2 * shards
    for number in range(count) if rig.full or shards == 1 else [draw.randrange(count)]:
        mine = {f"long {number}": random_prompt(seed * 100 + number, _LONG)}
        at = draw.randrange(1, 4 * _LONG // 5)
        with Running(head.address, history, mine, seed) as running:
            running.until_progress(f"long {number}", at)
            _victims(head)[number].kill()
        requests |= mine  # type: ignore[arg-type]
        head.wait_until_running()
    verdict.facts["killed"] = count
    restarted = {e.job for e in history.of("state") if e.restarts}
    verdict.expect(restarted, "no job shows that it was restarted")
    return rig.judge(verdict, history, requests, most_restarts=1)  # type: ignore[arg-type]


def stage_killed_in_prefill(rig: Rig, seed: int) -> Verdict:
    """SIGKILL of each stage while a long prompt is read."""
    return _kill_each_in_prefill(rig, seed, shards=1)


def shard_killed_in_prefill(rig: Rig, seed: int) -> Verdict:
    """SIGKILL of each shard of stages of two shards while a long prompt is read."""
    return _kill_each_in_prefill(rig, seed, shards=2)


def killed_at_random_chunks(rig: Rig, seed: int) -> Verdict:
    """SIGKILL of random stages at random chunks of one prompt, one after the other."""
    draw, history = random.Random(seed), History()
    head = rig.head()
    length, kills = (_LONG, 4) if rig.full else (4000, 2)
    requests = mixed_jobs(seed, length)
    with Running(head.address, history, requests, seed) as running:
        for at in sorted(draw.sample(range(256, length - 500), kills)):
            running.until_progress("long", at)
            draw.choice(_victims(head)).kill()
            head.wait_until_running()
    return rig.judge(Verdict({"kills": kills}), history, requests, most_restarts=kills)


def killed_in_decode(rig: Rig, seed: int) -> Verdict:
    """SIGKILL of a stage while answers are written."""
    draw, history = random.Random(seed), History()
    head = rig.head()
    requests = mixed_jobs(seed, 700)
    with Running(head.address, history, requests, seed) as running:
        running.until_tokens("answer", draw.randint(2, 60))
        draw.choice(_victims(head)).kill()
    head.wait_until_running()
    return rig.judge(Verdict(), history, requests, most_restarts=1)


def killed_during_recovery(rig: Rig, seed: int) -> Verdict:
    """SIGKILL of a stage, and of one that takes its place before it runs."""
    draw, history = random.Random(seed), History()
    head = rig.head()
    requests = mixed_jobs(seed, 2000)
    verdict = Verdict()
    with Running(head.address, history, requests, seed) as running:
        running.until_progress("long", 500)
        before = head.stage_pids()
        draw.choice(_victims(head)).kill()
        until(lambda: head.stage_pids() - before, "a process in the place of the killed one")
        time.sleep(draw.uniform(0, 0.5))
        new = [process for process in _victims(head) if process.pid not in before]
        if new:
            draw.choice(new).kill()
    head.wait_until_running()
    verdict.facts["killed_again"] = bool(new)
    return rig.judge(verdict, history, requests, most_restarts=2)


def head_killed(rig: Rig, seed: int) -> Verdict:
    """SIGKILL of the head process while jobs are read, written and waiting; another one takes them up."""
    draw, history = random.Random(seed), History()
    head = rig.head()
    requests = mixed_jobs(seed)
    with Running(head.address, history, requests, seed) as running:
        running.until_progress("long", draw.randrange(256, 3500))
        began = time.monotonic()
        head.kill()
        head.start()
        back = time.monotonic() - began
    return rig.judge(Verdict({"back_s": round(back, 2)}), history, requests, most_restarts=1)


def worker_slow(rig: Rig, seed: int) -> Verdict:
    """A stage that stands still most of the time (SIGSTOP, SIGCONT) is slow, not dead: nothing is restarted."""
    draw, history, verdict = random.Random(seed), History(), Verdict()
    head = rig.head()
    requests = mixed_jobs(seed)
    before, ended = head.stage_pids(), threading.Event()
    victim = draw.choice(_victims(head))

    def slow_down() -> None:
        while not ended.is_set():
            victim.suspend()
            time.sleep(draw.uniform(0.05, 1.5 if rig.full else 0.4))
            victim.resume()
            time.sleep(0.1)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        with Running(head.address, history, requests, seed):
            pass
    finally:
        ended.set()
        thread.join()
    verdict.expect(head.stage_pids() == before, "a slow stage was replaced")
    if rig.full:
        _stop_for_a_minute(rig, seed, verdict)
    return rig.judge(verdict, history, requests, most_restarts=0)


def _stop_for_a_minute(rig: Rig, seed: int, verdict: Verdict) -> None:
    """Let a stage run at a fifteenth of its speed, so that 60 s are within its prediction, then stop it for as long."""
    chunk, total = 3072, 10
    history, requests = History(), {"prompt": random_prompt(seed, total * chunk)}
    with rig.fresh(2, 1, prefill={"max_num_batched_tokens": chunk}) as head:
        head.start()
        before, slow = head.stage_pids(), threading.Event()
        victim = head.shards()[1, 0]  # the last stage: it begins the next chunk when progress is seen

        def slow_down() -> None:
            while not slow.is_set():
                victim.suspend()
                time.sleep(0.28)
                victim.resume()
                time.sleep(0.02)

        thread = threading.Thread(target=slow_down)
        thread.start()
        try:
            with Running(head.address, history, requests, seed) as running:
                running.until_progress("prompt", 4 * chunk)
                slow.set()
                thread.join()
                stopped_at = _processed(history) // chunk
                victim.suspend()
                time.sleep(60)
                victim.resume()
        finally:
            slow.set()
            thread.join()
        verdict.facts["stopped_at_chunk"] = stopped_at
        verdict.expect(not running.failed and stopped_at < total - 1, "the prompt was read before the stage stopped")
        verdict.expect(head.stage_pids() == before, "a stage that was within its prediction was replaced")
    rig.judge(verdict, history, requests, most_restarts=0)


def _processed(history: History) -> int:
    return max((entry.processed for entry in history.of("progress")), default=0)


def worker_hung(rig: Rig, seed: int) -> Verdict:
    """A stage that stands still for good (SIGSTOP) is found and replaced, within a minute and a half."""
    draw, history, verdict = random.Random(seed), History(), Verdict()
    head = rig.head()
    requests = mixed_jobs(seed)
    before = head.stage_pids()
    with Running(head.address, history, requests, seed) as running:
        running.until_progress("long", 500)
        began = time.monotonic()
        victim = draw.choice(_victims(head))
        victim.suspend()
        until(lambda: victim.pid not in head.stage_pids(), "another process in the place of the hung one")
        verdict.facts["noticed_s"] = round(time.monotonic() - began, 1)
    head.wait_until_running()
    verdict.expect(head.stage_pids() != before, "the hung stage is still there")
    verdict.expect(verdict.facts["noticed_s"] < 90, f"noticed after {verdict.facts['noticed_s']} s")
    return rig.judge(verdict, history, requests, most_restarts=1)
