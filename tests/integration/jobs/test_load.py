"""Two hundred jobs of twenty clients at once: everyone gets an end, every page comes back, nothing leaks."""

from __future__ import annotations

import gc
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import Client, JobEnded, TokenEvent
from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.head import LONG, ROOT, Served, free_port, until

CLIENTS = 20
JOBS_EACH = 5  # in each of the two halves
MIB = 1 << 20
# Tolerances between the ends of the halves. Memory: allocator and SQLite caches that still fill; the tokens of a
# half are below 1 MiB. Descriptors: connections that gRPC is about to close.
MORE_RSS = 16 * MIB
MORE_FDS = 4
# The store keeps a reading connection of two files for as many calls as ever read at one moment, besides its writer.
STORE_FDS = 2 * (CLIENTS + 4) + 3
SIZES = (20, 21, 63, 64, 65, 300, 1009, 3000)


class Caller:
    """One client with its own connection and its own random choices."""

    def __init__(self, address: str, half: int, number: int) -> None:
        self._client = Client(address, timeout_s=LONG)
        self._random = random.Random(f"{half} {number}")

    def run(self) -> list[str]:
        with self._client:
            return [self._one(at) for at in range(JOBS_EACH)]

    def _one(self, at: int) -> str:
        draw = self._random
        options: dict[str, Any] = {"max_tokens": draw.randint(1, 24), "ignore_eos": draw.random() < 0.5}
        size = draw.choice(SIZES)
        if at == 1:
            questions = [f"What is the code of {draw.random()}?" for _ in range(draw.randint(2, 4))]
            document = "The secret code of dark river is 12345. " * (size // 12 + 1)
            job = self._client.submit(document, questions, **options)
        else:
            job = self._client.submit(token_ids=[draw.randrange(1, 4096) for _ in range(size)], **options)
        if at == 2:
            job.cancel()
            assert job.state in ("cancelled", "succeeded"), job.state
            return job.state
        if at in (3, 4):
            events = list(job.stream())
            numbers = [event.number for event in events if isinstance(event, TokenEvent)]
            assert isinstance(events[-1], JobEnded)
            assert numbers == list(range(1, job.data.last_event + 1))
        job.wait(LONG).refresh()
        assert job.state == "succeeded", job.error
        assert sum(len(answer.token_ids) for answer in job.answers) == job.data.last_event
        assert all(answer.finish_reason in ("stop", "length") for answer in job.answers)
        return job.state


@pytest.fixture
def served(tmp_path: Path) -> Any:
    overrides: dict[str, object] = {
        "data_dir": str(tmp_path), "server.port": free_port(), "prefill.max_num_seqs": 16,
        "prefill.max_num_batched_tokens": 1024,
    }  # fmt: skip
    with (
        ClusterRuntime(load_deployment(ROOT / "configs" / "single.yaml", overrides)) as runtime,
        Served(runtime, tmp_path) as running,
    ):
        yield running


def run_half(served: Served, half: int) -> Counter[str]:
    with ThreadPoolExecutor(CLIENTS) as threads:
        callers = [threads.submit(Caller(served.address, half, number).run) for number in range(CLIENTS)]
        ends = Counter(state for caller in callers for state in caller.result())
    until(lambda: not served.service._live and not served.runtime.kv_usage, "all pages are back")
    check_engine(served.runtime.engine)
    return ends


def footprint(store: Path) -> tuple[int, int, int]:
    """(bytes, open files, those of the store in `store`) of this process: it is head and clients."""
    gc.collect()
    process = psutil.Process()
    of_store = sum(Path(file.path).is_relative_to(store) for file in process.open_files())
    return process.memory_info().rss, process.num_fds() - of_store, of_store


def test_two_hundred_jobs(served: Served, tmp_path: Path) -> None:
    ends = run_half(served, 0)
    rss, files, _ = footprint(tmp_path)
    ends += run_half(served, 1)
    rss_after, files_after, of_store = footprint(tmp_path)
    assert ends.total() == 2 * CLIENTS * JOBS_EACH == 200
    assert ends["cancelled"] > 0
    assert ends["succeeded"] >= 160
    assert rss_after - rss < MORE_RSS, (rss, rss_after)
    assert files_after - files <= MORE_FDS, (files, files_after)
    assert of_store <= STORE_FDS
    assert served.service.counts() == (0, 0)
    stored = Counter(job.state for job in served.client.jobs())
    assert stored == ends
    assert all(stage.state != "unreachable" for stage in served.client.status().stages)
