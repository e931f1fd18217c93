"""The head's door for monitors: gRPC health checking on `server.host:server.port`."""

from __future__ import annotations

from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.preflight import PreflightError


class HealthDoor:
    """Answers the standard `grpc.health.v1.Health` service: SERVING from `start` to `close`."""

    def __init__(self, host: str, port: int) -> None:
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._server: grpc.Server | None = None
        self._health = health.HealthServicer()

    def start(self) -> None:
        """Bind and answer. Raises PreflightError when the port is taken."""
        threads = futures.ThreadPoolExecutor(2, thread_name_prefix="door")
        # without SO_REUSEPORT two heads on one port are an error instead of a lottery
        server = grpc.server(threads, options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise PreflightError(f"server.port: {self._address} cannot be bound: choose a free port, or 0") from error
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        server.start()
        self._server = server

    def close(self) -> None:
        """Stop answering; may be called twice."""
        if self._server is not None:
            self._health.enter_graceful_shutdown()
            self._server.stop(grace=0.5).wait()
            self._server = None
