"""gRPC channels, TLS between nodes and the launch token: the same options on every side of every connection."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

from protos.jobs.limits import MAX_REQUEST_BYTES
from protos.stage.identity import Identity

_TOKEN_KEY = "longreach-launch-token"
_EPOCH_KEY = "longreach-epoch"

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_REQUEST_BYTES),
    # Frees what belongs to a machine that was lost without a word. Who hangs is for the head to judge, which knows how
    # long a step may take: a process that is stopped for minutes keeps its connections.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 3_600_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.enable_http_proxy", 0),
]


_KEY = "cluster.inter_node_tls"
# What gRPC says when TLS between two processes fails, and what it means; the first that fits.
_TLS_FAILURES = {
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is of another launch",
    "Hostname Verification": "its certificate is that of another shard",
    "handshake failed": "TLS failed",
}
# What it says when the other end ends the connection, which it does without a reason.
_CLOSED = ("Socket closed", "Connection reset", "Broken pipe")


def open_channel(address: str, identity: Identity | None = None, name: str = "") -> grpc.Channel:
    """Open a channel to `unix:/path` or `host:port` inside the cluster.

    Args:
        identity: of this process, to which a `host:port` must show a certificate of the same launch; without one the
            channel is plain text. Unix sockets always are.
        name: that the certificate must be made out to.
    """
    if identity is None or address.startswith("unix:"):
        return grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(identity.authority, identity.key, identity.certificate)
    options = [*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", name)]
    return grpc.secure_channel(address, credentials, options=options)


def add_tcp_port(server: grpc.Server, host: str, identity: Identity | None) -> str:
    """Have a server listen on a free port of an IP address; returns it as `host:port`.

    Args:
        identity: of this process; connections must then show a certificate of the same launch.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    if identity is None:
        return f"{host}:{server.add_insecure_port(f'{host}:0')}"
    pair = (identity.key, identity.certificate)
    credentials = grpc.ssl_server_credentials([pair], identity.authority, require_client_auth=True)
    return f"{host}:{server.add_secure_port(f'{host}:0', credentials)}"


def explain_loss(details: str, address: str, is_secure: bool) -> str:
    """Return what gRPC says of a connection to `address` that broke; one line with the reason where TLS was it.

    Args:
        is_secure: this end speaks TLS.
    """
    if not address or address.startswith("unix:"):
        return details
    for sign, meaning in _TLS_FAILURES.items():
        if sign in details:
            return f"{_KEY}: {address} is refused: {meaning}"
    if any(sign in details for sign in _CLOSED):
        mine = "does not accept the certificate of this process" if is_secure else "accepts only TLS"
        return f"{details}: {address} has ended the connection, is gone, or {mine} ({_KEY})"
    return details


def token_metadata(token: str) -> list[tuple[str, str]]:
    """Return the metadata that proves membership of this launch."""
    return [(_TOKEN_KEY, token)]


def call_metadata(token: str, epoch: int) -> list[tuple[str, str]]:
    """Return the metadata of a stream that belongs to one epoch of this launch."""
    return [*token_metadata(token), (_EPOCH_KEY, str(epoch))]


def epoch_of(metadata: Iterable[tuple[str, str | bytes]]) -> int:
    """Return the epoch that a call says it belongs to; 0 if it says none."""
    text = str(dict(metadata).get(_EPOCH_KEY, ""))
    return int(text) if text.isdecimal() else 0


class TokenInterceptor(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]
    """Refuses every call that does not carry the token of this launch."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        token = dict(details.invocation_metadata).get(_TOKEN_KEY, "")
        if hmac.compare_digest(str(token).encode(), self._token):
            return continuation(details)
        return refusing_handler("this stage belongs to another launch (wrong token)")


def refusing_handler(
    reason: str, on_refused: Callable[[grpc.ServicerContext], None] = lambda context: None
) -> grpc.RpcMethodHandler:
    """Return a handler that answers a call of any kind with UNAUTHENTICATED, without waiting for its message."""

    def refuse(_requests: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        on_refused(context)
        context.abort(grpc.StatusCode.UNAUTHENTICATED, reason)
        yield b""  # makes this a generator; abort has raised

    return grpc.stream_stream_rpc_method_handler(refuse)
