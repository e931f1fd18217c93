"""The head: one process that holds the runtime, the job service and the door, from start to drain."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from cluster.config.deployment import load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.model import ServiceLimits
from cluster.jobs.service import JobService
from cluster.jobs.store import JobStore
from cluster.server.grpc_server import GrpcServer
from cluster.server.metrics import MetricsServer
from cluster.stages.launcher import LaunchStatus
from cluster.stages.preflight import check_port

SWITCH_INTERVAL_S = 0.0005  # between threads of the head; Python's 5 ms would delay the engine by as much a step
_log = logging.getLogger(__name__)


def run_head(
    config_path: Path,
    on_status: Callable[[LaunchStatus], None],
    on_ready: Callable[[str], None],
) -> int:
    """Serve until SIGTERM or SIGINT, then drain; returns the exit code.

    Args:
        on_status: what is being started.
        on_ready: called once with the address clients connect to.

    Raises:
        UserError: bad configuration or checkpoint. PreflightError, PlacementError, StageError: nothing is left
            running.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    deployment = load_deployment(config_path)
    config = deployment.config
    check_port(config.server.host, config.server.port)
    check_port(config.server.metrics_host, config.server.metrics_port)
    signals = _Signals()

    def on_launch(status: LaunchStatus) -> None:
        on_status(status)
        signals.renew()

    runtime = ClusterRuntime(deployment, on_launch)
    with runtime:
        store = JobStore(config.data_dir / "jobs.sqlite")
        documents = DocumentStore(config.data_dir / "documents", store, config.server.document_ttl_s)
        limits = ServiceLimits(
            config.server.max_queued_jobs, config.server.max_document_bytes, config.server.result_ttl_s,
            config.server.document_ttl_s,
        )  # fmt: skip
        service = JobService(runtime, store, documents, limits)
        gateway = GrpcServer(service, config.server, config.security)
        metrics = MetricsServer(service, runtime, config.server.metrics_host, config.server.metrics_port)
        try:
            service.start()
            metrics.start()
            address = gateway.start()
            signals.install()
            on_ready(address)
            signals.wait()
            _log.info("draining")
            gateway.set_serving(False)
            service.drain(config.server.drain_timeout_s)
        finally:
            service.close()
            gateway.close(1.0)
            metrics.close()
            store.close()
    return 0


class _Signals:
    """SIGTERM and SIGINT as a wish to stop. Ray replaces their handlers, so each start of the pipeline renews ours."""

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
