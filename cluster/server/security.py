"""Who may call the server: API keys from a file, checked before any method runs, and the certificates of TLS."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc

from cluster.common.certificates import check_pair, load_certificates
from cluster.common.errors import PreflightError
from cluster.config.schema import SecuritySection
from protos.stage.channel import refusing_handler

MIN_KEY_CHARS = 16
_MAX_FILE_BYTES = 1 << 20
# monitors and load balancers have no key; they only learn whether the server is serving
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})


class ApiKeys:
    """The keys that give access. Only their SHA-256 is kept, so that no key can end up in a log or a dump."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def matches(self, key: str) -> bool:
        """Return whether this is one of the keys; takes as long for every key of the file."""
        digest = _digest(key)
        return sum(hmac.compare_digest(known, digest) for known in self._digests) > 0


def load_api_keys(path: Path) -> ApiKeys:
    """Read a keys file: a line a key, `name:key` or `key`; empty lines and those that begin with `#` are skipped.

    Raises:
        PreflightError: naming file and line, never a key; also when everyone may read the file or it has no key.
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


def _parse_keys(what: str, path: Path, text: str) -> Iterator[str]:
    first_lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        key = line.rpartition(":")[2].strip()
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
        yield key


def _read_secret(what: str, path: Path) -> bytes:
    """Return the content of a file that only its owner and group may read. Raises PreflightError."""
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
    """Return the TLS of the server, None without; with an authority, clients need a certificate of it.

    Raises:
        PreflightError: a file is missing or not PEM, or key and certificate do not belong together.
    """
    certificate, key, authority = security.tls_cert_file, security.tls_key_file, security.tls_client_ca_file
    if certificate is None or key is None:
        return None
    key_bytes = _read_secret("security.tls_key_file", key)
    certificate_bytes = _read_public("security.tls_cert_file", certificate)
    authority_bytes = None if authority is None else _read_public("security.tls_client_ca_file", authority)
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


def _read_public(what: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PreflightError(f"{what}: {path}: cannot be read: {error.strerror}") from error


class KeyInterceptor(grpc.ServerInterceptor):  # type: ignore[misc, unused-ignore]  # grpc has no types
    """Refuses every call without a key, of every service, known or not; only `OPEN_METHODS` need none."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys
        self._refusal = refusing_handler("an API key is needed: metadata `authorization: Bearer KEY`")

    def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> Any:
        if details.method in OPEN_METHODS or self._allows(details.invocation_metadata):
            return continuation(details)
        return self._refusal

    def _allows(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        values = [value for name, value in metadata if name.lower() == "authorization"]
        if len(values) != 1 or not isinstance(values[0], str):
            return False
        scheme, _, key = values[0].partition(" ")
        return scheme.lower() == "bearer" and self._keys.matches(key.strip())


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
