"""The job service over HTTP on `server.http_host:server.http_port`: uvicorn on a thread of the head process."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn

from cluster.access.call_pool import StallWatch
from cluster.access.keys import Keys
from cluster.common.errors import PreflightError
from cluster.common.watched_thread import Watched, WatchedThreads
from cluster.config.schema import SecuritySection
from cluster.http.app import make_app
from cluster.http.batches.runner import BatchRunner
from cluster.http.core.backend import SHORT_CALLS, Backend
from cluster.http.core.protocol import KEEP_ALIVE_S, BoundedProtocol

_IDLE_CONNECTIONS = 384  # beside one for each of `server.max_streams`; more are closed at once
_BACKLOG = 256
_HANDSHAKE_S = 10.0  # of TLS
_MAX_HEAD_BYTES = 32 << 10  # request line and headers


class HttpServer:
    """Serves one job service from `start` to `close`.

    Failure contract: holds no state of jobs. A lost connection ends the request and, for attached jobs, the job.
    """

    def __init__(
        self, backend: Backend, security: SecuritySection, keys: Keys | None, *, port: int | None = None,
        on_refused: Callable[[str, str], None] = lambda peer, path: None,
    ) -> None:  # fmt: skip
        """
        Args:
            keys: those that give access; None: none is needed.
            port: replaces `server.http_port`; 0 binds any free port.
        """
        self._backend = backend
        self._security = security
        self._port = backend.limits.http_port if port is None else port
        self._app = make_app(backend, keys, on_refused)
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._serving = WatchedThreads("HTTP")
        self._stalls = StallWatch([backend.streams, backend.short])
        self._batches = BatchRunner(backend, backend.service, keys)

    @property
    def threads(self) -> list[Watched]:
        """The threads without which clients are not served."""
        return [self._serving, self._stalls.thread, self._batches.thread]

    def start(self) -> str:
        """Bind and answer requests; returns the URL.

        Raises:
            PreflightError: the port is taken, or the certificates cannot be used.
        """
        listener = self._bind()
        try:
            server = uvicorn.Server(self._uvicorn())
            server.config.load()
        except (OSError, ssl.SSLError) as error:
            listener.close()
            raise PreflightError(f"security.tls_cert_file: cannot be used for HTTP: {error}") from error
        thread = threading.Thread(target=_run, args=(server, listener), name="http", daemon=True)
        thread.start()
        self._serving.watch([thread])
        self._stalls.start()
        self._batches.start()
        self._server, self._thread = server, thread
        scheme = "https" if server.config.is_ssl else "http"
        host, port = listener.getsockname()[:2]
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def _bind(self) -> socket.socket:
        host = self._backend.limits.http_host
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, self._port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(_BACKLOG)
            except OSError:
                listener.close()
                raise
        except OSError as error:
            problem = f"{host}:{self._port} cannot be bound ({error.strerror}): choose a free port, or 0"
            raise PreflightError(f"server.http_port: {problem}") from error
        return listener

    def _uvicorn(self) -> uvicorn.Config:
        limits, security = self._backend.limits, self._security
        tls: dict[str, Any] = {}
        if security.tls_cert_file is not None:
            tls = {"ssl_certfile": str(security.tls_cert_file), "ssl_keyfile": str(security.tls_key_file)}
            if security.tls_client_ca_file is not None:
                tls |= {"ssl_ca_certs": str(security.tls_client_ca_file), "ssl_cert_reqs": ssl.CERT_REQUIRED}
        most = limits.max_streams + SHORT_CALLS + _IDLE_CONNECTIONS
        protocol: Any = partial(BoundedProtocol, max_connections=most)
        return uvicorn.Config(
            self._app, http=protocol, ws="none", lifespan="off", loop="asyncio", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_S, timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=_MAX_HEAD_BYTES, backlog=_BACKLOG, **tls,
        )  # fmt: skip

    def close(self, grace_s: float = 1.0) -> None:
        """Refuse new connections, let running requests end for `grace_s`, cancel the rest; may be called twice."""
        server, self._server = self._server, None
        if server is not None and self._thread is not None:
            self._batches.close()
            self._serving.release()
            server.config.timeout_graceful_shutdown = max(1, round(grace_s))
            server.should_exit = True
            self._thread.join(grace_s + 10.0)
            self._stalls.close()
        self._backend.close()


def _run(server: uvicorn.Server, listener: socket.socket) -> None:
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # requests that are no HTTP; errors are logged by us
    try:
        asyncio.run(_serve(server, listener))
    finally:
        listener.close()


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve; who does not begin TLS in time is closed: the protocol knows of connections that have."""
    loop: Any = asyncio.get_running_loop()
    if server.config.is_ssl:
        loop.create_server = partial(loop.create_server, ssl_handshake_timeout=_HANDSHAKE_S)
    await server.serve([listener])
