"""PEM files: what is accepted as a certificate, as a pair, and which names it has."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from cluster.common.certificates import certificate_names, check_pair, date_problems, load_certificates
from tests.support.data.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def test_files_of_one_or_more_certificates(authority: Authority) -> None:
    first, second = (authority.issue(name)[0].read_bytes() for name in ("first", "second"))
    assert len(load_certificates(first)) == 1
    assert len(load_certificates(first + second)) == 2
    for noise in (b"", b"\x00\xff noise", first[:-40]):
        with pytest.raises(ValueError, match=r"pem|valid") as caught:
            load_certificates(noise)
        assert "\n" not in str(caught.value)


def test_pairs(authority: Authority) -> None:
    certificate, key = (path.read_bytes() for path in authority.issue("head"))
    _, other_key = (path.read_bytes() for path in authority.issue("other"))
    check_pair(certificate, key)
    check_pair(certificate + authority.certificate, key)  # a chain begins with its own certificate
    encrypted = load_pem_private_key(key, None).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    for wrong, said in [(other_key, "key values mismatch"), (encrypted, "password"), (b"noise", "could not|unable")]:
        with pytest.raises(ValueError, match=said):
            check_pair(certificate, wrong)
    with pytest.raises(ValueError, match="unable"):
        check_pair(b"noise", key)


def test_names_of_a_certificate_that_is_valid_now(authority: Authority) -> None:
    certificate, _ = authority.issue("head", hosts=["10.1.2.3", "head.example.org", "localhost"])
    assert certificate_names(certificate.read_bytes()) == ["head.example.org", "localhost", "10.1.2.3"]
    late, _ = authority.issue("late", hours=-1)
    assert certificate_names(late.read_bytes()) == []


@pytest.mark.parametrize(
    ("hours", "last_part", "said"),
    [
        (24 * 31.0, 1.0, ""), (24 * 29.0, 1.0, "expires on"), (24 * 29.0, 1 / 3, ""), (0.4, 1 / 3, "expires on"),
        (1.0, 1 / 3, ""), (-0.1, 1 / 3, "expired on"),
    ],
)  # fmt: skip
def test_ends_that_are_near(authority: Authority, hours: float, last_part: float, said: str) -> None:
    problems = date_problems(authority.issue("head", hours=hours)[0].read_bytes(), last_part)
    assert len(problems) == bool(said)
    assert all(problem.startswith(said) for problem in problems)


def test_no_certificate_has_no_dates() -> None:
    with pytest.raises(ValueError, match=r"pem|valid"):
        date_problems(b"noise")
