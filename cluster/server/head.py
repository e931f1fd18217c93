"""The head process: runtime, job service, gRPC and HTTP servers and metrics of one deployment, from start to drain."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.access.audit import AUDIT_FILE, AuditLog
from cluster.access.call_pool import CallPool
from cluster.access.live_keys import LiveKeys
from cluster.common.errors import ClusterError, PreflightError
from cluster.common.signals import call_undisturbed
from cluster.common.steady_clock import SteadyClock
from cluster.config.deployment import Deployment, load_deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.jobs.documents import DocumentStore
from cluster.jobs.service import JobService
from cluster.jobs.store import JobStore
from cluster.server.grpc_server import GrpcServer
from cluster.server.health import HealthMonitor
from cluster.server.metrics import MetricsServer
from cluster.server.security import check_security
from cluster.server.state_files import reachable
from cluster.stages.launcher import LaunchStatus
from cluster.stages.preflight import check_port

if TYPE_CHECKING:
    from cluster.http.http_server import HttpServer

_SWITCH_INTERVAL_S = 0.0005  # between threads of the head; Python's 5 ms would delay the engine by as much a step
_LOOK_EVERY_S = 1.0  # how soon the main thread notices that the head must end
_END_WITHIN_S = 90.0  # from the end of the drain; a start of the pipeline that is under way is waited for for 60 s
HTTP_PACKAGES = ("fastapi", "uvicorn", "python_multipart")  # of the extra `http`
_EXIT_FAILED = 3  # as in `cluster.cli`
_log = logging.getLogger(__name__)


class Head:
    """Composes all parts of a head process; `close` undoes `start` and may be called twice.

    After `start` it has `service`, `store`, and the `address` that clients connect to.
    """

    def __init__(
        self, deployment: Deployment, on_status: Callable[[LaunchStatus], None] = lambda status: None, *,
        runtime: ClusterRuntime | None = None, port: int | None = None, http_port: int | None = None,
        clock: Callable[[], float] | None = None, on_warning: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """
        Args:
            on_status: called at every start of the pipeline with what is being started.
            on_warning: called at the start with what is lost of the job store, as one line.
            runtime: one that runs already and goes on after `close`, instead of one of its own.
            port: replaces `server.port`; here 0 binds any free port.
            http_port: replaces `server.http_port` in the same way.
            clock: seconds since 1970 that pass evenly, instead of a `SteadyClock`.
        """
        self.runtime = runtime or ClusterRuntime(deployment, on_status)
        self._owns_runtime = runtime is None
        self._config = deployment.config
        self._port = port
        self._http_port = http_port
        self._clock = clock or SteadyClock()
        self._on_warning = on_warning
        self._health: HealthMonitor | None = None
        self._draining = False
        self._steps = ExitStack()

    def start(self) -> None:
        """Start pipeline, job service, metrics and servers; raises as `run_head`, with nothing left running."""
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
            self._metrics = metrics = MetricsServer(
                self.service, self.runtime, server.metrics_host, server.metrics_port
            )
            steps.callback(metrics.close)
            streams = CallPool(server.max_streams, "server.max_streams")
            self._audit = AuditLog(data_dir / AUDIT_FILE)
            steps.callback(self._audit.close)
            keys_file = self._config.security.api_keys_file
            self._keys = LiveKeys(keys_file, streams, self._audit) if keys_file is not None else None
            self._grpc = GrpcServer(
                self.service, server, self._config.security, self._port, streams, self._keys, self._audit
            )
            steps.callback(self._grpc.close, 1.0)
            self._http = self._make_http(streams) if server.http_port or self._http_port is not None else None
            if self._http is not None:
                steps.callback(self._http.close, 1.0)
            steps.callback(self.service.close)
            self._check_ports()  # the weights took a while, and jobs are taken up only by a head that can be reached
            self.service.start()
            metrics.start()
            if self._keys is not None:
                steps.callback(self._keys.close)
                self._keys.start()
            self.address = self._grpc.start()
            if self._http is not None:
                scheme, _, address = self._http.start().partition("//")
                self.service.http_url = f"{scheme}//{reachable(address)}"
            self._health = HealthMonitor(
                lambda: [
                    *self.service.threads, metrics.threads, *self._grpc.threads,
                    *(self._http.threads if self._http is not None else ()),
                    *([self._keys.thread] if self._keys is not None else ()),
                ],
                [self.service.check_store, self.service.check_pipeline], self._show,
            )  # fmt: skip
            steps.callback(self._health.close)
            self._health.start()
            self._steps = steps.pop_all()

    def _make_http(self, streams: CallPool) -> HttpServer:
        from cluster.http.core.backend import Backend
        from cluster.http.http_server import HttpServer

        backend = Backend(self.service, self.runtime, self._config.server, streams, self._metrics.text, self._audit)
        if self._keys is not None:
            self._keys.watch(backend.short)  # a body may take its time, and begin what outlasts the request
        return HttpServer(
            backend, self._config.security, self._keys, port=self._http_port, on_refused=self._audit.refuse
        )

    def _check_ports(self) -> None:
        server = self._config.server
        if server.http_port and not all(map(find_spec, HTTP_PACKAGES)):
            need = "needs packages that are not installed: pip install 'longreach[http]', or server.http_port: 0"
            raise PreflightError(f"server.http_port: {server.http_port}: {need}")
        if server.http_port and self._http_port is None:
            check_port(server.http_host, server.http_port)
        if self._port is None:
            check_port(server.host, server.port)
        check_port(server.metrics_host, server.metrics_port)

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
        """Stop without touching the state of unfinished jobs: service, HTTP, gRPC, metrics, store, pipeline."""
        self._steps.close()


def run_head(
    config_path: Path, on_status: Callable[[LaunchStatus], None], on_ready: Callable[[str, str], None],
    on_warning: Callable[[str], None] = lambda line: None,
) -> int:  # fmt: skip
    """Serve until SIGTERM or SIGINT, then drain; returns the exit code. Called on the main thread.

    The head lives on a thread of its own: the main thread does nothing but take signals, so that native code and its
    handlers never see one. A signal during the start ends it at the next report of `on_status`.

    A head that does not end within `_END_WITHIN_S` after that, or after its failure, is ended at once.

    Args:
        on_status: what is being started.
        on_ready: called once with the address clients connect to, and the URL over HTTP, "" without.
        on_warning: called at the start with what is lost of the job store, as one line.

    Raises:
        UserError: bad configuration or checkpoint. PreflightError, JobStoreError, PlacementError, StageError,
            KeyboardInterrupt (a signal during the start): nothing is left running. ClusterError: a part of the head
            died; the next one goes on with its jobs.
    """
    life = _Life(config_path, on_status, on_ready, on_warning)
    call_undisturbed(life.run, life.stop)
    return 0


def _end_now() -> None:
    """End this process at once, with all that Ray started for it."""
    print(f"longreach: error: the head did not stop within {_END_WITHIN_S:g} s: killed", file=sys.stderr, flush=True)
    os._exit(_EXIT_FAILED)


class _Life:
    """The life of a head, from start to drain."""

    def __init__(
        self, config_path: Path, on_status: Callable[[LaunchStatus], None], on_ready: Callable[[str, str], None],
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
        deployment = load_deployment(self._config_path, on_progress=self._on_download)
        with ExitStack() as steps:
            guard = threading.Timer(_END_WITHIN_S, _end_now)
            guard.daemon = True
            steps.callback(guard.cancel)
            head = steps.enter_context(closing(Head(deployment, self._on_launch, on_warning=self._on_warning)))
            head.start()
            self._is_ready = True
            self._on_ready(head.address, head.service.http_url)
            while not head.failure and not self._stopping.wait(_LOOK_EVERY_S):
                pass
            if not head.failure:
                _log.info("draining")
                head.drain()
            guard.start()
            if failure := head.failure:
                raise ClusterError(f"{failure}: see the log above; start the head again: its jobs go on")

    def _on_download(self, phase: str, done: int, total: int) -> None:
        self._on_launch(LaunchStatus(phase, done, total))

    def _on_launch(self, status: LaunchStatus) -> None:
        if self._stopping.is_set() and not self._is_ready:
            raise KeyboardInterrupt
        self._on_status(status)
