"""Names and dates of certificates, the rule of public hosts; the interceptor in full is in tests/integration."""

import datetime
import re
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.common.certificates import certificate_names, date_problems
from cluster.config.deployment import ConfigError, load_config
from cluster.config.schema import SecuritySection
from cluster.server import security as security_module
from cluster.server.security import (
    CertificateWatch,
    certificate_warnings,
    server_credentials,
)
from tests.support.data.certificates import Authority
from tests.support.fakes.stage import eventually

KEY = "0123456789abcdef"


def write(tmp_path: Path, content: str | bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
    return path


def test_without_tls_there_are_no_credentials() -> None:
    assert server_credentials(SecuritySection()) is None


@pytest.mark.parametrize(
    ("hosts", "hours", "names"),
    [
        (("localhost", "127.0.0.1"), 1.0, ["localhost", "127.0.0.1"]),
        (("127.0.0.1", "b.example.org", "a.example.org", "*.c.org"), 1.0,
         ["b.example.org", "a.example.org", "*.c.org", "127.0.0.1"]),
        ((), 1.0, []),
        (("localhost",), -1.0, []),
    ],
)  # fmt: skip
def test_names_of_a_certificate(tmp_path: Path, hosts: tuple[str, ...], hours: float, names: list[str]) -> None:
    certificate, _ = Authority(tmp_path, "authority").issue("head", hosts, hours)
    assert certificate_names(certificate.read_bytes()) == names
    issuer = Authority(tmp_path, "issuer")
    certificate.write_bytes(certificate.read_bytes() + issuer.certificate)  # a chain: the first one counts
    assert certificate_names(certificate.read_bytes()) == names


@pytest.mark.parametrize(
    ("hours", "said"),
    [(24 * 29.0, "expires on .* in 28 days"), (-1.0, "expired on"), (24 * 40.0, ""), (1.0, "expires on .* in 0 days")],
)
def test_dates_of_certificates_are_warned_of(tmp_path: Path, hours: float, said: str, caplog) -> None:
    certificate, key = Authority(tmp_path, "authority").issue("head", hours=hours)
    security = SecuritySection(tls_cert_file=certificate, tls_key_file=key)
    lines = certificate_warnings(security)
    assert len(lines) == bool(said)
    assert server_credentials(security) is not None  # it starts all the same
    watch = CertificateWatch(security)
    watch.start()
    watch.close()
    assert [record.getMessage() for record in caplog.records] == lines
    if said:
        assert re.search(f"^security.tls_cert_file: {certificate}: {said}.*: renew it", lines[0])


def test_a_certificate_of_tomorrow_and_an_authority_that_expired(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "authority").issue("head", hours=24 * 40)
    clients = Authority(tmp_path, "clients")
    chain = tmp_path / "chain.pem"
    old, _ = clients.issue("old", hours=-48.0)
    chain.write_bytes(certificate.read_bytes() + old.read_bytes())
    security = SecuritySection(tls_cert_file=certificate, tls_key_file=key, tls_client_ca_file=chain)
    (line,) = certificate_warnings(security)
    assert line.startswith(f"security.tls_client_ca_file: {chain}: certificate 2 of 2 expired on 20")
    (late,) = date_problems(certificate_from(clients, start_hours=5.0))
    assert late.startswith("is not valid before 20")


def certificate_from(authority: Authority, start_hours: float) -> bytes:
    """A certificate that begins in so many hours."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "head")])
    start = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=start_hours)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(start).not_valid_after(start + datetime.timedelta(days=99))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_the_watch_goes_on_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    certificate, key = Authority(tmp_path, "authority").issue("head", hours=-1.0)
    monkeypatch.setattr(security_module, "CERTIFICATES_EVERY_S", 0.01)
    watch = CertificateWatch(SecuritySection(tls_cert_file=certificate, tls_key_file=key))
    watch.start()
    certificate.unlink()
    eventually(lambda: len(caplog.records) > 2)
    watch.close()


def test_a_certificate_without_names(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "head")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(hours=1))
    path = tmp_path / "head.pem"
    path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    assert certificate_names(path.read_bytes()) == []


@pytest.mark.parametrize(
    ("security", "allowed"),
    [
        ("{}", False),
        ("{api_keys_file: k}", False),
        ("{tls_cert_file: c, tls_key_file: k}", False),
        ("{tls_cert_file: c, tls_key_file: k, tls_client_ca_file: a}", False),
        ("{api_keys_file: k, tls_cert_file: c, tls_key_file: k}", True),
        ("{allow_insecure_bind: true}", True),
    ],
)
def test_an_open_host_needs_keys_and_tls(tmp_path: Path, security: str, allowed: bool) -> None:
    path = tmp_path / "open.yaml"
    path.write_text(f"model: {{path: m}}\nserver: {{host: 0.0.0.0}}\nsecurity: {security}\n")
    if allowed:
        assert load_config(path).server.host == "0.0.0.0"
    else:
        with pytest.raises(ConfigError, match=r"server\.host: 0\.0\.0\.0: is not a loopback address") as caught:
            load_config(path)
        assert len(str(caught.value).splitlines()) == 1
