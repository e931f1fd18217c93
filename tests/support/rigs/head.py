"""Heads for tests: one in a process of its own that may be killed, and one in this process over any runtime."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import psutil

from cluster.bench.head_process import HeadProcess as HeadOfBenchmarks
from cluster.client.client import Client, Job
from cluster.client.retry import RetryPolicy
from cluster.engine.runtime import ClusterRuntime
from cluster.server.head import Head
from tests.support.paths import ROOT

NEEDLE = ROOT / "configs" / "needle"
LONG = 120.0  # seconds after which a state that should come is given up; nothing waits that long when all is well
PATIENT = RetryPolicy(attempts=200, first_s=0.1, largest_s=0.5)


def until(condition: Callable[[], object], what: str = "", within_s: float = LONG) -> None:
    """Wait for a state, however slow the machine is."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"it did not happen: {what or condition}"
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class HeadProcess(HeadOfBenchmarks):
    """`longreach serve` over the needle checkpoint, on a port of its own."""

    def __init__(
        self, folder: Path, stages: int = 1, server: str = "", shards: int = 1, model: Path = NEEDLE
    ) -> None:  # fmt: skip
        super().__init__(folder / "head.yaml", folder / "data", folder / "head.log")
        self.port = free_port()
        self.prelude = ""  # Python code that the next head runs before all else
        self.config.write_text(
            f"model:\n  path: {model}\n  dtype: float32\n  max_model_len: 40k\n"
            "  rope_scaling: {rope_type: yarn, factor: 10.0, original_max_position_embeddings: 4096}\n"
            f"cluster:\n  pipeline_parallel_size: {stages}\n  expert_parallel_size: {shards}\n"
            "  threads_per_actor: 1\n  cpus_per_actor: 0.5\n"
            "prefill: {max_num_batched_tokens: 256, max_num_seqs: 2}\n"
            f"kv_cache:\n  bytes: 256MiB\nserver:\n  port: {self.port}\n{server}\ndata_dir: {self.data}\n"
        )

    def __enter__(self) -> HeadProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start a head on the same data directory and port, and wait until it is ready."""
        code = f"{self.prelude}\nfrom cluster.cli.main import main\nmain(prog_name='longreach')"
        self.command = [sys.executable, *(["-c", code] if self.prelude else ["-m", "cluster.cli"])]
        super().start()

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def client(self) -> Client:
        return Client(f"127.0.0.1:{self.port}", retries=PATIENT)

    def actors(self) -> list[psutil.Process]:
        """The stage processes."""
        return self.find("stage")

    def daemon(self, name: str) -> psutil.Process:
        """A process of the local Ray by the name of its program."""
        return next(process for process in self.processes() if process.name() == name)

    def close(self) -> None:
        """Stop the head if it runs, then whatever is left of it."""
        if self.is_running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.stop()
        super().close()


class Served:
    """A head in this process on a free port, with a client, over a runtime that runs already and goes on afterwards."""

    def __init__(self, runtime: ClusterRuntime, folder: Path, **server: object) -> None:
        """Args: `folder` is the data directory; `server` are keys of that section of the configuration."""
        self.runtime = runtime
        self.folder = folder
        config = runtime.deployment.config
        section = config.server.model_copy(update=server)
        config = config.model_copy(update={"server": section, "data_dir": folder})
        self._head = Head(replace(runtime.deployment, config=config), runtime=runtime, port=0)
        self._client: Client | None = None

    def __enter__(self) -> Served:
        self._head.start()
        self.service, self.store, self.address = self._head.service, self._head.store, self._head.address
        self._client = Client(self.address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for record in self.store.unfinished():
            self.service.cancel(record.id)  # the runtime goes on with the next service
        self.client.close()
        self._head.close()

    @property
    def client(self) -> Client:
        assert self._client is not None, "start first"
        return self._client

    def occupy(self, prompt: str = "The code of dark river is", max_tokens: int = 3000) -> Job:
        """A job that decodes for long."""
        job = self.client.submit(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
        until(lambda: job.refresh().state == "decoding", "a decoding job")
        return job


def tokens_of(job: Job) -> list[tuple[int, ...]]:
    """Token ids of every answer of a job that succeeded."""
    job.wait(LONG).refresh()
    assert job.state == "succeeded", (job.state, job.error)
    return [answer.token_ids for answer in job.answers]
