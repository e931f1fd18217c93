"""Certificate files of a client, and what it says about gRPC's details of a connection that did not come about."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import InvalidRequest
from cluster.client.connection import TlsFiles
from cluster.client.tls import explain_failure, is_handshake_failure, read_files
from tests.support.data.certificates import Authority

CA = TlsFiles(Path("ca.pem"), None, None)
MUTUAL = TlsFiles(Path("ca.pem"), Path("cert.pem"), Path("key.pem"))
PUBLIC = TlsFiles(None, Path("cert.pem"), Path("key.pem"))
FAILED = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:7777: "
TSI = (
    f"{FAILED}Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
)
CLOSED = "failed to connect to all addresses; last error: UNAVAILABLE: ipv4:127.0.0.1:7777: Socket closed"


@pytest.mark.parametrize(
    ("details", "files", "said"),
    [
        (f"{TSI}WRONG_VERSION_NUMBER: Invalid certificate verification context: OK", CA,
         "WRONG_VERSION_NUMBER: Invalid certificate verification context: the head speaks plain text, this client TLS: "
         "leave out ca_file, cert_file and key_file (flags and LONGREACH_* variables), or give the head a certificate "
         "(security.tls_cert_file)"),
        (f"{TSI}CERTIFICATE_VERIFY_FAILED: certificate has expired: OK", CA,
         "CERTIFICATE_VERIFY_FAILED: certificate has expired: renew the head's security.tls_cert_file, or set the "
         "clocks right"),
        (f"{TSI}CERTIFICATE_VERIFY_FAILED: certificate is not yet valid: OK", CA,
         "CERTIFICATE_VERIFY_FAILED: certificate is not yet valid: renew the head's security.tls_cert_file, or set the "
         "clocks right"),
        (f"{TSI}CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: OK", CA,
         "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate: the head's certificate is not vouched for "
         "by ca_file ca.pem: give its authority as ca_file (--ca-file, LONGREACH_CA_FILE)"),
        (f"{TSI}CERTIFICATE_VERIFY_FAILED: self signed certificate: OK", PUBLIC,
         "CERTIFICATE_VERIFY_FAILED: self signed certificate: the head's certificate is not vouched for by the public "
         "authorities: give its authority as ca_file (--ca-file, LONGREACH_CA_FILE)"),
        (f"{TSI}NEW_KIND_OF_TROUBLE: OK", CA,
         "NEW_KIND_OF_TROUBLE: check ca_file, cert_file and key_file, and the head's security section"),
    ],
)  # fmt: skip
def test_a_failed_handshake_is_passed_on_with_the_way_out(details: str, files: TlsFiles, said: str) -> None:
    assert is_handshake_failure(details)
    assert explain_failure(details, files) == said


def test_a_wrong_name_is_passed_on_with_the_way_out() -> None:
    details = (
        f"{FAILED}Custom verification check failed with error: UNAUTHENTICATED: Hostname Verification Check failed."
    )
    assert is_handshake_failure(details)
    assert explain_failure(details, CA) == (
        f"{details[:-1]}: connect by a name that is in the certificate, or give it as server_name (--server-name)"
    )


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        (None, "if the head speaks TLS, give its authority or its certificate (ca_file, --ca-file, LONGREACH_CA_FILE)"),
        (CA, "if the head wants a certificate of this client, give cert_file and key_file (--cert-file and --key-file, "
         "LONGREACH_CERT_FILE and LONGREACH_KEY_FILE)"),
        (MUTUAL, "perhaps the head does not accept cert_file cert.pem: it must be valid today and signed by an "
         "authority of the head's security.tls_client_ca_file"),
    ],
)  # fmt: skip
def test_a_connection_that_is_closed_at_once_may_be_about_tls(files: TlsFiles | None, hint: str) -> None:
    assert not is_handshake_failure(CLOSED)
    assert explain_failure(CLOSED, files) == f"the connection was closed before an answer: {hint}"


@pytest.mark.parametrize("details", ["Socket closed", f"{FAILED}Failed to connect to remote host: refused", ""])
@pytest.mark.parametrize("files", [None, CA, MUTUAL])
def test_other_failures_are_not_about_tls(details: str, files: TlsFiles | None) -> None:
    assert not is_handshake_failure(details)
    assert explain_failure(details, files) == ""


def test_files_are_read_once_they_are_known_to_be_good(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    cert, key = authority.issue("client")
    noise = tmp_path / "noise"
    noise.write_bytes(b"\x00\xff noise")
    assert read_files(TlsFiles(None, None, None)) == (None, None, None)
    content = (authority.file.read_bytes(), key.read_bytes(), cert.read_bytes())
    assert read_files(TlsFiles(authority.file, cert, key)) == content
    for files, said in [
        (TlsFiles(noise, None, None), f"ca_file: {noise}: must be PEM certificates (unable to load pem file)"),
        (TlsFiles(tmp_path, None, None), f"ca_file: {tmp_path}: cannot be read (Is a directory)"),
        (TlsFiles(None, noise, key), f"cert_file: {noise}: must be a PEM certificate that goes with key_file: {key} "
         "(an unencrypted PEM key): unable to load pem file"),
        (TlsFiles(None, cert, authority.issue("other")[1]), f"cert_file: {cert}: must be a PEM certificate that goes "
         f"with key_file: {tmp_path / 'other.key'} (an unencrypted PEM key): key values mismatch"),
    ]:  # fmt: skip
        with pytest.raises(InvalidRequest) as caught:
            read_files(files)
        assert str(caught.value) == said


@pytest.mark.parametrize(("hours", "warned"), [(24 * 40.0, 0), (24 * 10.0, 0), (-1.0, 1)])
def test_a_certificate_that_ends_is_warned_of(
    tmp_path: Path, hours: float, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = Authority(tmp_path, "authority").issue("client", hours=hours)
    assert read_files(TlsFiles(None, certificate, key))[2] == certificate.read_bytes()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == warned
    assert all(line.startswith(f"cert_file: {certificate}: expire") for line in lines)


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="ca_file: /dev/zero: must be at most 1048576 bytes"):
        read_files(TlsFiles(Path("/dev/zero"), None, None))
