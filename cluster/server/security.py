"""Who may call the gRPC server: API keys, checked before any method runs, and the certificates of TLS."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from cluster.access.keys import Keys, load_api_keys
from cluster.common.certificates import check_pair, date_problems, load_certificates
from cluster.common.errors import PreflightError
from cluster.common.secret_files import read_public, read_secret
from cluster.common.watched_thread import WatchedThread
from cluster.config.schema import SecuritySection
from protos.stage.channel import refusing_handler

CERTIFICATES_EVERY_S = 86400.0  # between warnings about certificates
_log = logging.getLogger(__name__)
# monitors and load balancers have no key; they only learn whether the server is serving
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})


def server_credentials(security: SecuritySection) -> grpc.ServerCredentials | None:
    """Return the TLS of the server, None without; with an authority, clients need a certificate of it.

    Raises:
        PreflightError: a file is missing or not PEM, or key and certificate do not belong together.
    """
    certificate, key, authority = security.tls_cert_file, security.tls_key_file, security.tls_client_ca_file
    if certificate is None or key is None:
        return None
    key_bytes = read_secret("security.tls_key_file", key)
    certificate_bytes = read_public("security.tls_cert_file", certificate)
    authority_bytes = None if authority is None else read_public("security.tls_client_ca_file", authority)
    try:
        check_pair(certificate_bytes, key_bytes)
    except ValueError as error:
        raise PreflightError(
            f"security.tls_cert_file: {certificate}: not a PEM certificate that goes with security.tls_key_file: {key} "
            f"(an unencrypted PEM key): {error}"
        ) from error
    try:
        if authority_bytes is not None:
            load_certificates(authority_bytes)
    except ValueError as error:
        raise PreflightError(f"security.tls_client_ca_file: {authority}: must be PEM certificates: {error}") from error
    return grpc.ssl_server_credentials(
        [(key_bytes, certificate_bytes)],
        root_certificates=authority_bytes,
        require_client_auth=authority_bytes is not None,
    )


def check_security(security: SecuritySection) -> None:
    """Refuse keys and certificates that cannot be used (PreflightError), before anything is started."""
    if security.api_keys_file is not None:
        load_api_keys(security.api_keys_file)
    server_credentials(security)


def certificate_warnings(security: SecuritySection) -> list[str]:
    """Return a line for each certificate of the head that is not valid now or will soon not be. Raises PreflightError.

    An authority of clients that has expired refuses all of its clients.
    """
    return _date_warnings(_read_certificates(security))


def _read_certificates(security: SecuritySection) -> dict[str, bytes]:
    """Return the PEM of each certificate file by its key and path."""
    paths = {key: getattr(security, key) for key in ("tls_cert_file", "tls_client_ca_file")}
    return {
        f"security.{key}: {path}": read_public(f"security.{key}", path) for key, path in paths.items() if path
    }  # fmt: skip


def _date_warnings(certificates: Mapping[str, bytes]) -> list[str]:
    lines = []
    for where, pem in certificates.items():
        try:
            problems = date_problems(pem)
        except ValueError as error:
            raise PreflightError(f"{where}: must be PEM certificates: {error}") from error
        lines += [f"{where}: {problem}: renew it, then start the head again" for problem in problems]
    return lines


class CertificateWatch:
    """Logs the warnings about the certificates that the head started with, at `start` and then daily, until `close`."""

    def __init__(self, security: SecuritySection) -> None:
        self._security = security
        self._certificates: Mapping[str, bytes] = {}
        self._stop = threading.Event()
        self.thread = WatchedThread(self._run, "certificates", self._stop)

    def start(self) -> None:
        """Raises PreflightError: a certificate cannot be read."""
        self._certificates = _read_certificates(self._security)  # a file renewed later is not what gRPC goes on using
        self._warn()
        if self._certificates:
            self.thread.start()

    def close(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(CERTIFICATES_EVERY_S):
            self._warn()

    def _warn(self) -> None:
        for line in _date_warnings(self._certificates):
            _log.warning("%s", line)


class KeyInterceptor(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]  # grpc has no types
    """Refuses every call without a key, of every service, known or not; only `OPEN_METHODS` need none."""

    def __init__(self, keys: Keys, on_refused: Callable[[str, str], None] = lambda peer, method: None) -> None:
        """
        Args:
            on_refused: called with the peer and the method of each refused call.
        """
        self._keys = keys
        self._on_refused = on_refused

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        key = presented_key(details.invocation_metadata)
        if details.method in OPEN_METHODS or (key is not None and self._keys.tenant(key) is not None):
            return continuation(details)
        return refusing_handler(
            "an API key is needed: metadata `authorization: Bearer KEY`",
            lambda context: self._on_refused(context.peer(), details.method),
        )


def presented_key(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return the key of `authorization: Bearer KEY`, None when it is absent, given twice or of another kind."""
    values = [value for name, value in metadata if name.lower() == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return None
    scheme, _, key = values[0].partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None
