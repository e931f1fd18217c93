"""Certificates made while a test runs."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.fakes.jobs_api import write_secret

HOSTS = ("localhost", "127.0.0.1")


class Authority:
    """A certificate authority of one test."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(self._name, self._key, is_authority=True)
        self.file = write_secret(folder / f"{name}.pem", self.certificate, 0o644)

    def issue(self, name: str, hosts: Sequence[str] = HOSTS, hours: float = 1.0) -> tuple[Path, Path]:
        """(certificate, key) for some hosts, as files; with negative `hours` it has expired."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        signed = self._sign(subject, key, hosts=hosts, hours=hours)
        certificate = write_secret(self._folder / f"{name}.crt", signed, 0o644)
        return certificate, write_secret(self._folder / f"{name}.key", pem)

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, is_authority: bool = False,
        hosts: Sequence[str] = HOSTS, hours: float = 1.0,
    ) -> bytes:  # fmt: skip
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=hours)
        names = [
            x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host) for host in hosts
        ]
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(end - datetime.timedelta(hours=1 + abs(hours)))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
