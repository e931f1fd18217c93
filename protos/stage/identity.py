"""Keys and certificates of one launch, for the connections that leave a node.

The head makes an authority for each launch, which lives in its memory only. Every process makes a key of its own, which
never leaves it, and has the authority sign the rest (a PKCS #10 request). A process trusts the certificates of its own
launch and no others, and both ends of a connection show theirs.
"""

from __future__ import annotations

import datetime
import secrets
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

HEAD = "head.longreach"
_SKEW = datetime.timedelta(days=1)  # that the clocks of nodes may differ
_VALID = datetime.timedelta(days=3650)  # longer than a launch; who leaves it is refused by the next one's authority


def shard_name(stage: int, rank: int) -> str:
    """Return the name that the certificate of a shard is made out to."""
    return f"stage{stage}.shard{rank}.longreach"


@dataclass(frozen=True, slots=True)
class Identity:
    """What a process shows and trusts, as PEM: its key and certificate, and the authority of its launch."""

    key: bytes = field(repr=False)
    certificate: bytes
    authority: bytes


class PrivateKey:
    """The key of this process."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())

    def request(self) -> bytes:
        """Return the request for a certificate, as PEM; the authority decides about the name."""
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def identity(self, certificate: bytes, authority: bytes) -> Identity:
        """Return the key with what the authority has made of its request."""
        pem = self._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Identity(pem, certificate, authority)


class LaunchAuthority:
    """The certificate authority of one launch."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = f"longreach launch {secrets.token_hex(8)}"  # unique, so that a stranger is told as one
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=True, crl_sign=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = self._builder(self._name, self._key.public_key(), is_authority=True)
        self.certificate = self._sign(builder.add_extension(usage, critical=True))

    def sign(self, request: bytes, name: str) -> bytes:
        """Return a certificate for the key of a request, made out to `name`, as PEM.

        Raises:
            ValueError: it is no request, or was not signed with the key that it names.
        """
        try:
            asked = x509.load_pem_x509_csr(request)
            key = asked.public_key()
        except UnsupportedAlgorithm as error:
            raise ValueError(str(error)) from error
        if not asked.is_signature_valid or not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError("the request for a certificate is not signed with an elliptic-curve key of its own")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = (
            self._builder(subject, key, is_authority=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(both, critical=False)
        )
        return self._sign(builder)

    def make_identity(self, name: str) -> Identity:
        """Return an identity for this process, made out to `name`."""
        key = PrivateKey()
        return key.identity(self.sign(key.request(), name), self.certificate)

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, is_authority: bool
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + _VALID)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False)
        )

    def _sign(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
