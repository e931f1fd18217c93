"""Who may call the server: API keys from a file, checked before any method runs, and the certificates of TLS."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc

from cluster.common.certificates import check_pair, date_problems, load_certificates
from cluster.common.errors import PreflightError
from cluster.common.watched_thread import WatchedThread
from cluster.config.schema import SecuritySection
from protos.stage.channel import refusing_handler

MIN_KEY_CHARS = 16
MAX_NAME_CHARS = 100
CERTIFICATES_EVERY_S = 86400.0  # between warnings about certificates
_MAX_FILE_BYTES = 1 << 20
_log = logging.getLogger(__name__)
# monitors and load balancers have no key; they only learn whether the server is serving
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})


class ApiKeys:
    """The keys that give access. Only their SHA-256 is kept, so that no key can end up in a log or a dump."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        """
        Args:
            keys: name of each key, empty for one without.
        """
        self._names = {_digest(key): name for key, name in keys.items()}

    def __len__(self) -> int:
        return len(self._names)

    def name(self, key: str) -> str | None:
        """Return the name of a key, the first digits of its SHA-256 if it has none, or None if it is not one of them.

        Takes as long for every key of the file.
        """
        digest, name = _digest(key), None
        for known, its_name in self._names.items():
            if hmac.compare_digest(known, digest):
                name = its_name or f"sha256:{known.hex()[:8]}"
        return name


def load_api_keys(path: Path) -> ApiKeys:
    """Read a keys file: a line a key, `name:key` or `key`; empty lines and those that begin with `#` are skipped.

    The names are for the log.

    Raises:
        PreflightError: naming file and line, never a key; also when everyone may read the file or it has no key.
    """
    what = "security.api_keys_file"
    try:
        text = _read_secret(what, path).decode("ascii")
    except UnicodeDecodeError as error:
        raise PreflightError(f"{what}: {path}: byte {error.start}: must be ASCII text") from None
    keys = dict(_parse_keys(what, path, text))
    if not keys:
        raise PreflightError(f"{what}: {path}: has no key; write one a line, at least {MIN_KEY_CHARS} characters")
    return ApiKeys(keys)


def _parse_keys(what: str, path: Path, text: str) -> Iterator[tuple[str, str]]:
    """Yield (key, name)."""
    first_lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = (part.strip() for part in line.rpartition(":"))
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
        if len(name) > MAX_NAME_CHARS or not name.isprintable():
            raise PreflightError(f"{where}: a name must have at most {MAX_NAME_CHARS} characters, none of control")
        first_lines[key] = number
        yield key, name


def _read_secret(what: str, path: Path) -> bytes:
    """Return the content of a file that only its owner and group may read, and nobody else replace.

    Raises:
        PreflightError.
    """
    content, mode = _read_file(what, path)
    if mode & 0o007:
        shown = oct(stat.S_IMODE(mode))[2:]
        raise PreflightError(f"{what}: {path}: mode {shown}: must not be open to others; chmod 600 {path}")
    for folder in dict.fromkeys((path.absolute().parent, path.resolve().parent)):  # of the link, and of its file
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            shown = oct(stat.S_IMODE(mode))[2:]
            raise PreflightError(
                f"{what}: {path}: mode {shown} of {folder}: others could replace the file; chmod o-w {folder}"
            )
    return content


def _read_file(what: str, path: Path) -> tuple[bytes, int]:
    """Return content and mode of a regular file of at most `_MAX_FILE_BYTES`. Raises PreflightError."""
    try:
        # not blocking: a pipe without a writer would be waited for
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            mode = os.fstat(file.fileno()).st_mode  # of the open file: no exchange in between
            if not stat.S_ISREG(mode):
                raise PreflightError(f"{what}: {path}: cannot be read: must be a regular file")
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise PreflightError(f"{what}: {path}: cannot be read: {error.strerror}") from error
    if len(content) > _MAX_FILE_BYTES:
        raise PreflightError(f"{what}: {path}: must be at most {_MAX_FILE_BYTES} bytes")
    return content, mode


def server_credentials(security: SecuritySection) -> grpc.ServerCredentials | None:
    """Return the TLS of the server, None without; with an authority, clients need a certificate of it.

    Raises:
        PreflightError: a file is missing or not PEM, or key and certificate do not belong together.
    """
    certificate, key, authority = security.tls_cert_file, security.tls_key_file, security.tls_client_ca_file
    if certificate is None or key is None:
        return None
    key_bytes = _read_secret("security.tls_key_file", key)
    certificate_bytes = _read_file("security.tls_cert_file", certificate)[0]
    authority_bytes = None if authority is None else _read_file("security.tls_client_ca_file", authority)[0]
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
        f"security.{key}: {path}": _read_file(f"security.{key}", path)[0] for key, path in paths.items() if path
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

    def __init__(self, keys: ApiKeys, on_refused: Callable[[str, str], None] = lambda peer, method: None) -> None:
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
        if details.method in OPEN_METHODS or (key is not None and self._keys.name(key) is not None):
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


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
