"""Certificates of a client: checked before use, and what is wrong when a TLS connection does not come about.

gRPC says only that a head is unavailable. A handshake with the standard library finds out why.
"""

from __future__ import annotations

import socket
import ssl

from cluster.client.connection import Connection, TlsFiles
from cluster.client.errors import InvalidRequest, TlsError
from cluster.common.addresses import split_address
from cluster.common.text_format import tls_reason

_PROBE_TIMEOUT_S = 3.0
_ALERT_AFTER_S = 1.0  # a head that wants a certificate says so after the handshake of TLS 1.3
_EXPIRED, _NOT_YET_VALID = 10, 9  # X509_V_ERR_*
_WRONG_NAMES = {62, 63, 64}
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # and empty SETTINGS


def check_files(files: TlsFiles) -> ssl.SSLContext:
    """A context of these files. Raises InvalidRequest: unreadable, not PEM, or not a pair."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: a head's own certificate may be given
    context.set_alpn_protocols(["h2"])
    for key, path in (("ca_file", files.ca), ("cert_file", files.cert), ("key_file", files.key)):
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise InvalidRequest(f"{key}: {path}: cannot be read ({error.strerror})") from error
    try:
        if files.ca is not None:
            context.load_verify_locations(files.ca)
        else:
            context.load_default_certs()
    except (ssl.SSLError, ValueError) as error:
        raise InvalidRequest(f"ca_file: {files.ca}: must be PEM certificates ({tls_reason(error)})") from error
    try:
        if files.cert is not None:
            context.load_cert_chain(files.cert, files.key, password=lambda: "")  # never asks at the terminal
    except (ssl.SSLError, ValueError) as error:
        raise InvalidRequest(
            f"cert_file: {files.cert}: must be a PEM certificate that goes with key_file: {files.key} (an unencrypted "
            f"PEM key): {tls_reason(error)}"
        ) from error
    return context


def find_mismatch(connection: Connection) -> TlsError | None:
    """Why TLS with this head cannot work; None when TLS is not what is wrong. Takes a few seconds at most."""
    where = split_address(connection.address)
    if connection.is_unix or where is None:
        return None
    try:
        with socket.create_connection(where, _PROBE_TIMEOUT_S) as plain:
            plain.settimeout(_PROBE_TIMEOUT_S)
            files = connection.tls
            if files is not None:
                return _try_tls(connection, files, plain, where[0])
            return _try_plaintext(connection.address, plain)
    except OSError:
        return None  # cannot be reached at all


def _try_plaintext(address: str, plain: socket.socket) -> TlsError | None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        context.wrap_socket(plain).close()
    except ssl.SSLError as error:
        if "ALERT" not in (error.reason or ""):
            return None  # whatever that is, it is not TLS
    return TlsError(
        f"{address}: the head speaks TLS, this client plain text: give its authority or its certificate (ca_file, "
        "--ca-file, LONGREACH_CA_FILE)"
    )


def _try_tls(connection: Connection, files: TlsFiles, plain: socket.socket, host: str) -> TlsError | None:
    address = connection.address
    try:
        with check_files(files).wrap_socket(plain, server_hostname=connection.server_name or host) as wrapped:
            return _try_call(address, files, wrapped)
    except ssl.SSLCertVerificationError as error:
        return TlsError(f"{address}: {_certificate_problem(files, error)}")
    except (ssl.SSLEOFError, ConnectionResetError):
        return None if files.cert is None else _refused(address, files, "connection closed")
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            return _refused(address, files, tls_reason(error))
        return TlsError(
            f"{address}: the head speaks plain text, this client TLS: leave out ca_file, cert_file and key_file "
            "(flags and LONGREACH_* variables), or give the head a certificate (security.tls_cert_file)"
        )


def _try_call(address: str, files: TlsFiles, wrapped: ssl.SSLSocket) -> TlsError | None:
    """After a handshake that this side finds good: whether the head agrees."""
    wrapped.settimeout(_ALERT_AFTER_S)
    try:
        wrapped.sendall(_PREFACE)
        if wrapped.recv(1):
            return None
    except TimeoutError:
        return None
    except ssl.SSLError as error:
        return _refused(address, files, tls_reason(error))
    except OSError:
        pass
    return _refused(address, files, "connection closed")


def _refused(address: str, files: TlsFiles, reason: str) -> TlsError:
    if files.cert is None:
        return TlsError(
            f"{address}: the head wants a certificate of this client ({reason}): give cert_file and key_file "
            "(--cert-file and --key-file, LONGREACH_CERT_FILE and LONGREACH_KEY_FILE)"
        )
    return TlsError(
        f"{address}: the head does not accept cert_file {files.cert} ({reason}): it must be valid today and signed by "
        "an authority of the head's security.tls_client_ca_file"
    )


def _certificate_problem(files: TlsFiles, error: ssl.SSLCertVerificationError) -> str:
    reason = error.verify_message.rstrip(".")
    if error.verify_code in (_EXPIRED, _NOT_YET_VALID):
        return f"{reason}: renew the head's security.tls_cert_file, or set the clocks right"
    if error.verify_code in _WRONG_NAMES:
        return f"{reason}: connect by a name that is in the certificate, or give it as server_name (--server-name)"
    trusted = f"ca_file {files.ca}" if files.ca is not None else "the public authorities"
    way_out = "give its authority as ca_file (--ca-file, LONGREACH_CA_FILE)"
    return f"the head's certificate is not vouched for by {trusted} ({reason}): {way_out}"
