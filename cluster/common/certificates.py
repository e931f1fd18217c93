"""PEM files of TLS, checked before gRPC gets them: it says what is wrong with them only in its log."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

SOON = datetime.timedelta(days=30)  # an end this near is said


def load_certificates(pem: bytes) -> list[x509.Certificate]:
    """Return the certificates of a PEM file, at least one. Raises ValueError."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ValueError(str(error).partition(". See")[0].lower()) from error


def check_pair(certificate: bytes, key: bytes) -> None:
    """Refuse a certificate and an unencrypted private key, both PEM, that do not belong together (ValueError)."""
    public = load_certificates(certificate)[0].public_key()
    try:
        private = load_pem_private_key(key, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:  # TypeError: it is encrypted
        raise ValueError(str(error).partition(". ")[0].lower()) from error
    if private.public_key() != public:
        raise ValueError("key values mismatch")


def date_problems(pem: bytes, last_part: float = 1.0) -> list[str]:
    """Return a phrase for each certificate of a PEM file that is not valid now, or not for `SOON` longer (ValueError).

    Args:
        last_part: the part of its validity, from its end, in which a certificate counts as ending soon.
    """
    problems = []
    now = datetime.datetime.now(datetime.UTC)
    certificates = load_certificates(pem)
    for number, certificate in enumerate(certificates, start=1):
        start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        which = "" if len(certificates) == 1 else f"certificate {number} of {len(certificates)} "
        if now > end:
            problems.append(f"{which}expired on {end:%Y-%m-%d %H:%M} UTC")
        elif now < start:
            problems.append(f"{which}is not valid before {start:%Y-%m-%d %H:%M} UTC")
        elif end - now < min(SOON, (end - start) * last_part):
            problems.append(f"{which}expires on {end:%Y-%m-%d %H:%M} UTC, in {(end - now).days} days")
    return problems


def certificate_names(pem: bytes) -> list[str]:
    """Return the DNS names, then the IP addresses, of a certificate that is valid now; none when it is not."""
    certificate = load_certificates(pem)[0]
    now = datetime.datetime.now(datetime.UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        return []
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.DNSName) + [str(ip) for ip in names.get_values_for_type(x509.IPAddress)]
