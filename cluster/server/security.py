"""Who may use the door: API keys from a file, checked before any method runs, and the certificates of TLS."""

from __future__ import annotations

import hashlib
import hmac
import os
import ssl
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc

from cluster.common.errors import PreflightError
from cluster.common.text_format import tls_reason
from cluster.config.schema import SecuritySection

MIN_KEY_CHARS = 16
_MAX_FILE_BYTES = 1 << 20
_HEADER = "authorization"
# monitors and load balancers have no key; the answer tells them only whether the door serves
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})


class ApiKeys:
    """The keys that open the door. Only their SHA-256 is kept, so that no key can end up in a log or a dump."""

    def __init__(self, keys: Iterable[tuple[str, str]]) -> None:
        """`keys` are (name, key); names are for people and may be empty."""
        self._digests = [_digest(key) for _, key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def matches(self, given: str) -> bool:
        """Whether this is one of the keys; takes as long for every key of the file."""
        digest = _digest(given)
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found


def load_api_keys(path: Path) -> ApiKeys:
    """Read a keys file: a line a key, `name:key` or `key`, `#` begins a comment line, empty lines are skipped.

    Raises PreflightError naming file and line, never a key, also when the file may be read by everyone or has no key.
    """
    what = "security.api_keys_file"
    try:
        text = _read_secret(what, path).decode("ascii")
    except UnicodeDecodeError as error:
        raise PreflightError(f"{what}: {path}: byte {error.start}: must be ASCII text") from None
    keys = list(_parse_keys(what, path, text))
    if not keys:
        raise PreflightError(f"{what}: {path}: has no key; write one a line, at least {MIN_KEY_CHARS} characters")
    return ApiKeys(keys)


def _parse_keys(what: str, path: Path, text: str) -> Iterator[tuple[str, str]]:
    first_lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.rpartition(":")
        name, key = name.strip(), key.strip()
        where = f"{what}: {path}:{number}"
        if len(key) < MIN_KEY_CHARS:
            raise PreflightError(
                f"{where}: the key has {len(key)} characters: must have at least {MIN_KEY_CHARS}; "
                "`openssl rand -hex 32` makes one"
            )
        if not key.isprintable() or " " in key:
            raise PreflightError(f"{where}: a key must not contain spaces or control characters")
        if key in first_lines:
            raise PreflightError(f"{where}: the key of line {first_lines[key]} again; each line needs its own")
        first_lines[key] = number
        yield name, key


def _read_secret(what: str, path: Path) -> bytes:
    """The content of a file that only its owner and group may read. Raises PreflightError."""
    try:
        with open(path, "rb") as file:  # the mode is taken from the open file: no exchange in between
            mode = os.fstat(file.fileno()).st_mode
            if mode & 0o007:
                shown = oct(stat.S_IMODE(mode))[2:]
                raise PreflightError(f"{what}: {path}: mode {shown}: must not be open to others; chmod 600 {path}")
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PreflightError(f"{what}: {path}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise PreflightError(f"{what}: {path}: must be at most {_MAX_FILE_BYTES} bytes")
    return content


def server_credentials(security: SecuritySection) -> grpc.ServerCredentials | None:
    """TLS of the door, with client certificates required when an authority is given; None without TLS.

    Raises PreflightError when a file is missing, not PEM, or key and certificate do not belong together.
    """
    certificate, key, authority = security.tls_cert_file, security.tls_key_file, security.tls_client_ca_file
    if certificate is None or key is None:
        return None
    key_bytes = _read_secret("security.tls_key_file", key)
    certificate_bytes = _read_public("security.tls_cert_file", certificate)
    authority_bytes = None if authority is None else _read_public("security.tls_client_ca_file", authority)
    # gRPC reports a bad pair only in its log, and then at every handshake
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # never asks at the terminal
    except (ssl.SSLError, ValueError) as error:
        raise PreflightError(
            f"security.tls_cert_file: {certificate}: not a PEM certificate that goes with security.tls_key_file: {key} "
            f"(an unencrypted PEM key): {tls_reason(error)}"
        ) from error
    if authority is not None:
        try:
            context.load_verify_locations(authority)
        except (ssl.SSLError, ValueError) as error:
            raise PreflightError(
                f"security.tls_client_ca_file: {authority}: must be PEM certificates: {tls_reason(error)}"
            ) from error
    return grpc.ssl_server_credentials(
        [(key_bytes, certificate_bytes)],
        root_certificates=authority_bytes,
        require_client_auth=authority_bytes is not None,
    )


def certificate_names(security: SecuritySection) -> list[str]:
    """DNS names, then IP addresses, of the door's certificate; none when it has expired or names nothing.

    The standard library shows a certificate only after a handshake, which therefore takes place in memory.
    """
    assert security.tls_cert_file is not None
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(security.tls_cert_file, security.tls_key_file)
    client.load_verify_locations(security.tls_cert_file)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):  # flights of a handshake
        for side in sides:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError:
                return []
    certificate: Any = sides[0].getpeercert() or {}
    found = certificate.get("subjectAltName", ())
    return [value for kind in ("DNS", "IP Address") for name, value in found if name == kind]


def _read_public(what: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PreflightError(f"{what}: {path}: cannot be read: {error.strerror}") from error


class KeyInterceptor(grpc.ServerInterceptor):
    """Refuses every call without a key, of every service, known or not; only `OPEN_METHODS` need none."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys
        self._refusal = _refusal()

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method in OPEN_METHODS or self._allows(details.invocation_metadata):
            return continuation(details)
        return self._refusal

    def _allows(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        given = [value for name, value in metadata if name.lower() == _HEADER]
        if len(given) != 1 or not isinstance(given[0], str):
            return False
        scheme, _, key = given[0].partition(" ")
        return scheme.lower() == "bearer" and self._keys.matches(key.strip())


def _refusal() -> grpc.RpcMethodHandler:
    """Answers a call of any kind without waiting for its message."""

    def refuse(_requests: object, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "an API key is needed: metadata `authorization: Bearer KEY`")
        yield b""  # makes this a generator; abort has raised

    return grpc.stream_stream_rpc_method_handler(refuse)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
