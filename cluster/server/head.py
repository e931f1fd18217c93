"""The head process: runtime, job service, gRPC server and metrics of one deployment, from start to drain."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType

from cluster.common.errors import ClusterError
from cluster.common.steady_clock import SteadyClock
from cluster.config.deployment import Deployment, load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.service import JobService
from cluster.jobs.store import JobStore
from cluster.server.grpc_server import GrpcServer
from cluster.server.health import HealthMonitor
from cluster.server.metrics import MetricsServer
from cluster.stages.launcher import LaunchStatus
from cluster.stages.preflight import check_port

_SWITCH_INTERVAL_S = 0.0005  # between threads of the head; Python's 5 ms would delay the engine by as much a step
_LOOK_EVERY_S = 1.0  # how soon the main thread notices that the head must end
_END_WITHIN_S = 90.0  # from the end of the drain; a start of the pipeline that is under way is waited for for 60 s
_EXIT_FAILED = 3  # as in `cluster.cli`
_log = logging.getLogger(__name__)


class Head:
    """Composes all parts of a head process; `close` undoes `start` and may be called twice.

    After `start` it has `service`, `store`, and the `address` that clients connect to.
    """

    def __init__(
        self, deployment: Deployment, on_status: Callable[[LaunchStatus], None] = lambda status: None, *,
        runtime: ClusterRuntime | None = None, port: int | None = None, clock: Callable[[], float] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            on_status: called at every start of the pipeline with what is being started.
            runtime: one that runs already and goes on after `close`, instead of one of its own.
            port: replaces `server.port`; here 0 binds any free port.
            clock: seconds since 1970 that pass evenly, instead of a `SteadyClock`.
        """
        self.runtime = runtime or ClusterRuntime(deployment, on_status)
        self._owns_runtime = runtime is None
        self._config = deployment.config
        self._port = port
        self._clock = clock or SteadyClock()
        self._health: HealthMonitor | None = None
        self._draining = False
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
            if self._owns_runtime:
                steps.enter_context(self.runtime)
            self.store = JobStore(data_dir / "jobs.sqlite", self._clock)
            steps.callback(self.store.close)
            documents = DocumentStore(data_dir / "documents", self.store, server.document_ttl_s, self._clock)
            self.service = JobService(self.runtime, self.store, documents, server, self._clock)
            self._metrics = metrics = MetricsServer(
                self.service, self.runtime, server.metrics_host, server.metrics_port
            )
            steps.callback(metrics.close)
            self._grpc = GrpcServer(self.service, server, self._config.security, self._port)
            steps.callback(self._grpc.close, 1.0)
            steps.callback(self.service.close)
            self.service.start()
            metrics.start()
            self.address = self._grpc.start()
            self._health = HealthMonitor(
                lambda: [*self.service.threads, metrics.threads, self._grpc.threads],
                [self.service.check_store, self.service.check_pipeline], self._show,
            )  # fmt: skip
            steps.callback(self._health.close)
            self._health.start()
            self._steps = steps.pop_all()

    @property
    def failure(self) -> str:
        """Why this head must end, "" while it need not: a part of it has died that cannot be started again."""
        return self._health.fatal if self._health is not None else ""

    def _show(self, problem: str) -> None:
        self.service.problem = problem
        self._grpc.set_serving(not problem and not self._draining)

    def drain(self) -> None:
        """Refuse new jobs and wait for the running ones, for `server.drain_timeout_s`; the next head goes on."""
        self._draining = True
        self._grpc.set_serving(False)
        self.service.drain(self._config.server.drain_timeout_s)

    def close(self) -> None:
        """Stop without touching the state of unfinished jobs: service, gRPC, metrics, store, pipeline."""
        self._steps.close()


def run_head(config_path: Path, on_status: Callable[[LaunchStatus], None], on_ready: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns the exit code.

    A head that does not end within `_END_WITHIN_S` after that, or after its failure, is ended at once.

    Args:
        on_status: what is being started.
        on_ready: called once with the address clients connect to.

    Raises:
        UserError: bad configuration or checkpoint. PreflightError, PlacementError, StageError: nothing is left
            running. ClusterError: a part of the head died; the next one goes on with its jobs.
    """
    signals = _Signals()

    def on_launch(status: LaunchStatus) -> None:
        on_status(status)
        signals.renew()

    with ExitStack() as steps:
        guard = threading.Timer(_END_WITHIN_S, _end_now)
        guard.daemon = True
        steps.callback(guard.cancel)
        head = steps.enter_context(closing(Head(load_deployment(config_path), on_launch)))
        head.start()
        signals.install()
        on_ready(head.address)
        if signals.wait(lambda: head.failure):
            _log.info("draining")
            head.drain()
        guard.start()
        if failure := head.failure:
            raise ClusterError(f"{failure}: see the log above; start the head again: its jobs go on")
    return 0


def _end_now() -> None:
    """End this process at once, with all that Ray started for it."""
    print(f"longreach: error: the head did not stop within {_END_WITHIN_S:g} s: killed", file=sys.stderr, flush=True)
    os._exit(_EXIT_FAILED)


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

    def wait(self, failure: Callable[[], str]) -> bool:
        """Return True after a signal, False once `failure` says something (main thread)."""
        while not self._stopping:
            if failure():
                return False
            if self._changed.wait(_LOOK_EVERY_S):
                self._changed.clear()
                self.install()
        return True

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self._stopping = True
        self._changed.set()
