"""The head process: runtime, job service, gRPC server and metrics of one deployment, from start to drain."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

from cluster.common.signals import call_undisturbed
from cluster.config.deployment import Deployment, load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.service import JobService
from cluster.jobs.store import JobStore
from cluster.server.grpc_server import GrpcServer
from cluster.server.metrics import MetricsServer
from cluster.server.security import check_security
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
        self._check_ports()
        check_security(self._config.security)
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
                self.runtime.check_chat_template()  # before anything is loaded
                steps.enter_context(self.runtime)
            self.service = JobService(self.runtime, self.store, documents, server, self._clock)
            metrics = MetricsServer(self.service, self.runtime, server.metrics_host, server.metrics_port)
            steps.callback(metrics.close)
            self._grpc = GrpcServer(self.service, server, self._config.security, self._port)
            steps.callback(self._grpc.close, 1.0)
            steps.callback(self.service.close)
            self._check_ports()  # the weights took a while, and jobs are taken up only by a head that can be reached
            self.service.start()
            metrics.start()
            self.address = self._grpc.start()
            self._steps = steps.pop_all()

    def _check_ports(self) -> None:
        server = self._config.server
        if self._port is None:
            check_port(server.host, server.port)
        check_port(server.metrics_host, server.metrics_port)

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
    """Serve until SIGTERM or SIGINT, then drain; returns the exit code. Called on the main thread.

    The head lives on a thread of its own: the main thread does nothing but take signals, so that native code and its
    handlers never see one. A signal during the start ends it at the next report of `on_status`.

    Args:
        on_status: what is being started.
        on_ready: called once with the address clients connect to.
        on_warning: called at the start with what is lost of the job store, as one line.

    Raises:
        UserError: bad configuration or checkpoint. PreflightError, JobStoreError, PlacementError, StageError,
            KeyboardInterrupt (a signal during the start): nothing is left running.
    """
    life = _Life(config_path, on_status, on_ready, on_warning)
    call_undisturbed(life.run, life.stop)
    return 0


class _Life:
    """The life of a head, from start to drain."""

    def __init__(
        self, config_path: Path, on_status: Callable[[LaunchStatus], None], on_ready: Callable[[str], None],
        on_warning: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._config_path = config_path
        self._on_warning = on_warning
        self._on_status = on_status
        self._on_ready = on_ready
        self._stopping = threading.Event()
        self._is_ready = False

    def stop(self, number: int) -> None:
        """Begin to stop, after a signal; the second one changes nothing."""
        self._stopping.set()

    def run(self) -> None:
        deployment = load_deployment(self._config_path)
        with closing(Head(deployment, self._on_launch, on_warning=self._on_warning)) as head:
            head.start()
            self._is_ready = True
            self._on_ready(head.address)
            self._stopping.wait()
            _log.info("draining")
            head.drain()

    def _on_launch(self, status: LaunchStatus) -> None:
        if self._stopping.is_set() and not self._is_ready:
            raise KeyboardInterrupt
        self._on_status(status)
