"""Certificates of a client: checked before use, and what to do about a TLS connection that gRPC could not make."""

from __future__ import annotations

import logging
from pathlib import Path

from cluster.client.connection import TlsFiles
from cluster.client.errors import InvalidRequest
from cluster.common.certificates import check_pair, date_problems, load_certificates

_log = logging.getLogger(__name__)
_LAST_PART = 1 / 3  # clients may have certificates of hours, made anew by a machine
_MAX_FILE_BYTES = 1 << 20
_HANDSHAKE_SIGNS = ("handshake failed", "Hostname Verification")
# what gRPC says of a failed handshake, and the way out; the first that fits
_HINTS = {
    "WRONG_VERSION_NUMBER": "the head speaks plain text, this client TLS: leave out ca_file, cert_file and key_file "
    "(flags and LONGREACH_* variables), or give the head a certificate (security.tls_cert_file)",
    "certificate has expired": "renew the head's security.tls_cert_file, or set the clocks right",
    "certificate is not yet valid": "renew the head's security.tls_cert_file, or set the clocks right",
    "Hostname Verification": "connect by a name that is in the certificate, or give it as server_name (--server-name)",
    "CERTIFICATE_VERIFY_FAILED": "the head's certificate is not vouched for by {trusted}: give its authority as "
    "ca_file (--ca-file, LONGREACH_CA_FILE)",
    "": "check ca_file, cert_file and key_file, and the head's security section",
}
_SPEAKS_TLS = "if the head speaks TLS, give its authority or its certificate (ca_file, --ca-file, LONGREACH_CA_FILE)"
_WANTS_CERTIFICATE = (
    "if the head wants a certificate of this client, give cert_file and key_file (--cert-file and --key-file, "
    "LONGREACH_CERT_FILE and LONGREACH_KEY_FILE)"
)
_REFUSES_CERTIFICATE = (
    "perhaps the head does not accept cert_file {cert}: it must be valid today and signed by an authority of the "
    "head's security.tls_client_ca_file"
)


def read_files(files: TlsFiles) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Return the content of (ca, key, cert); a warning is logged when the certificate has expired or soon will.

    Raises:
        InvalidRequest: unreadable, not PEM, or not a pair.
    """
    ca, key, cert = _read("ca_file", files.ca), _read("key_file", files.key), _read("cert_file", files.cert)
    try:
        if ca is not None:
            load_certificates(ca)
    except ValueError as error:
        raise InvalidRequest(f"ca_file: {files.ca}: must be PEM certificates ({error})") from error
    try:
        if cert is not None and key is not None:
            check_pair(cert, key)
    except ValueError as error:
        raise InvalidRequest(
            f"cert_file: {files.cert}: must be a PEM certificate that goes with key_file: {files.key} (an unencrypted "
            f"PEM key): {error}"
        ) from error
    if cert is not None:
        for problem in date_problems(cert, _LAST_PART):
            _log.warning("cert_file: %s: %s: renew it", files.cert, problem)
    return ca, key, cert


def _read(key: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise InvalidRequest(f"{key}: {path}: must be at most {_MAX_FILE_BYTES} bytes")
        return content
    except OSError as error:
        raise InvalidRequest(f"{key}: {path}: cannot be read ({error.strerror})") from error


def is_handshake_failure(details: str) -> bool:
    """Whether gRPC's details say that TLS itself failed, which no other try would change."""
    return any(sign in details for sign in _HANDSHAKE_SIGNS)


def explain_failure(details: str, files: TlsFiles | None) -> str:
    """Return gRPC's reason and the way out when TLS may be why no connection came about, else "".

    A head that got plain text, or that did not accept the certificate of the client, closes the connection without a
    reason; so may one that is about to end.
    """
    if is_handshake_failure(details):
        reason = details.rpartition("OPENSSL_internal:")[2].removesuffix(": OK").rstrip(".")
        hint = next(hint for sign, hint in _HINTS.items() if sign in details)
    elif details.startswith("failed to connect") and details.endswith("Socket closed"):
        reason = "the connection was closed before an answer"
        hint = _SPEAKS_TLS if files is None else _WANTS_CERTIFICATE if files.cert is None else _REFUSES_CERTIFICATE
    else:
        return ""
    trusted = f"ca_file {files.ca}" if files is not None and files.ca is not None else "the public authorities"
    return f"{reason}: {hint.format(trusted=trusted, cert=files and files.cert)}"
