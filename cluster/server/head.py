"""The head process: runtime, job service, gRPC server and metrics of one deployment, from start to drain."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType

from cluster.config.deployment import Deployment, load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.service import JobService
from cluster.jobs.store import JobStore
from cluster.server.grpc_server import GrpcServer
from cluster.server.metrics import MetricsServer
from cluster.stages.launcher import LaunchStatus
from cluster.stages.preflight import check_port

_SWITCH_INTERVAL_S = 0.0005  # between threads of the head; Python's 5 ms would delay the engine by as much a step
_log = logging.getLogger(__name__)


class Head:
    """Composes all parts of a head process; `close` undoes `start` and may be called twice.

    After `start` it has `service`, `store`, and the `address` that clients connect to.
    """

    def __init__(
        self, deployment: Deployment, on_status: Callable[[LaunchStatus], None] = lambda status: None, *,
        runtime: ClusterRuntime | None = None, port: int | None = None, clock: Callable[[], float] = time.time,
        on_warning: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """
        Args:
            on_status: called at every start of the pipeline with what is being started.
            on_warning: called at the start with what is lost of the job store, as one line.
            runtime: one that runs already and goes on after `close`, instead of one of its own.
            port: replaces `server.port`; here 0 binds any free port.
            clock: seconds since 1970.
        """
        self.runtime = runtime or ClusterRuntime(deployment, on_status)
        self._owns_runtime = runtime is None
        self._config = deployment.config
        self._port = port
        self._clock = clock
        self._on_warning = on_warning
        self._steps = ExitStack()

    def start(self) -> None:
        """Start pipeline, job service, metrics and gRPC server; raises as `run_head`, with nothing left running."""
        server, data_dir = self._config.server, self._config.data_dir
        if self._port is None:
            check_port(server.host, server.port)
        check_port(server.metrics_host, server.metrics_port)
        with ExitStack() as steps:  # closed in the opposite order
            steps.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            self.store = JobStore(data_dir / "jobs.sqlite", self._clock)  # before any weight is loaded
            steps.callback(self.store.close)
            documents = DocumentStore(
                data_dir / "documents", self.store, server.document_ttl_s, server.max_documents_bytes, self._clock
            )
            if self.store.warning:
                self._on_warning(self.store.warning)
            if self._owns_runtime:
                steps.enter_context(self.runtime)
            self.service = JobService(self.runtime, self.store, documents, server, self._clock)
            metrics = MetricsServer(self.service, self.runtime, server.metrics_host, server.metrics_port)
            steps.callback(metrics.close)
            self._grpc = GrpcServer(self.service, server, self._config.security, self._port)
            steps.callback(self._grpc.close, 1.0)
            steps.callback(self.service.close)
            self.service.start()
            metrics.start()
            self.address = self._grpc.start()
            self._steps = steps.pop_all()

    def drain(self) -> None:
        """Refuse new jobs and wait for the running ones, for `server.drain_timeout_s`; the next head goes on."""
        self._grpc.set_serving(False)
        self.service.drain(self._config.server.drain_timeout_s)

    def close(self) -> None:
        """Stop without touching the state of unfinished jobs: service, gRPC, metrics, store, pipeline."""
        self._steps.close()


def run_head(
    config_path: Path, on_status: Callable[[LaunchStatus], None], on_ready: Callable[[str], None],
    on_warning: Callable[[str], None] = lambda line: None,
) -> int:  # fmt: skip
    """Serve until SIGTERM or SIGINT, then drain; returns the exit code.

    Args:
        on_status: what is being started.
        on_ready: called once with the address clients connect to.
        on_warning: called at the start with what is lost of the job store, as one line.

    Raises:
        UserError: bad configuration or checkpoint. PreflightError, JobStoreError, PlacementError, StageError: nothing
            is left running.
    """
    signals = _Signals()

    def on_launch(status: LaunchStatus) -> None:
        on_status(status)
        signals.renew()

    with closing(Head(load_deployment(config_path), on_launch, on_warning=on_warning)) as head:
        head.start()
        signals.install()
        on_ready(head.address)
        signals.wait()
        _log.info("draining")
        head.drain()
    return 0


class _Signals:
    """Waits for SIGTERM or SIGINT. Ray replaces the handlers, so each start of the pipeline renews ours."""

    def __init__(self) -> None:
        self._changed = threading.Event()
        self._stopping = False

    def renew(self) -> None:
        """Have the main thread install the handlers again; only it may. Any thread may call this."""
        self._changed.set()

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def wait(self) -> None:
        """Return after a signal (main thread)."""
        while not self._stopping:
            self._changed.wait()
            self._changed.clear()
            self.install()

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        self._changed.set()
