"""The head: one process that holds the session, the job service and the door, from start to drain."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from cluster.config import load_deployment
from cluster.documents import Documents
from cluster.gateway_grpc import Gateway
from cluster.job_store import JobStore
from cluster.launcher import LaunchStatus
from cluster.metrics import MetricsDoor
from cluster.preflight import check_port
from cluster.service import JobService
from cluster.service_api import ServiceLimits
from cluster.session import Session

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
    check_port(config.server.host, config.server.metrics_port)
    stop = threading.Event()
    session = Session(deployment, on_status)
    with session:
        store = JobStore(config.data_dir / "jobs.sqlite")
        documents = Documents(config.data_dir / "documents", store, config.server.document_ttl_s)
        limits = ServiceLimits(
            config.server.max_queued_jobs, config.server.max_document_bytes, config.server.result_ttl_s,
            config.server.document_ttl_s,
        )  # fmt: skip
        service = JobService(session, store, documents, limits)
        gateway = Gateway(service, config.server, config.security)
        metrics = MetricsDoor(service, session, config.server.host, config.server.metrics_port)
        try:
            service.start()
            metrics.start()
            address = gateway.start()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda _number, _frame: stop.set())
            on_ready(address)
            stop.wait()
            _log.info("draining")
            gateway.set_serving(False)
            service.drain(config.server.drain_timeout_s)
        finally:
            service.close()
            gateway.close(1.0)
            metrics.close()
            store.close()
    return 0
