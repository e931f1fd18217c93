"""Keys and certificates of a launch: what they prove, and to whom, in handshakes in memory."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from cryptography import x509

from protos.stage.identity import HEAD, Identity, LaunchAuthority, PrivateKey, shard_name

NAME = shard_name(1, 0)


def context(folder: Path, identity: Identity, is_server: bool) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
    pair = folder / "pair.pem"
    pair.write_bytes(identity.key + identity.certificate)
    made.load_cert_chain(pair)
    made.load_verify_locations(cadata=identity.authority.decode())
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    return made


def shake_hands(folder: Path, server: Identity, client: Identity, name: str) -> None:
    """Raise ssl.SSLError when either end refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        context(folder, client, False).wrap_bio(to_client, to_server, server_hostname=name),
        context(folder, server, True).wrap_bio(to_server, to_client, server_side=True),
    ]
    left = list(ends)
    for _ in range(10):
        for end in list(left):
            try:
                end.do_handshake()
                left.remove(end)
            except ssl.SSLWantReadError:
                pass
        if not left:
            return
    raise AssertionError("the handshake does not end")


def test_both_ends_of_one_launch_accept_each_other(tmp_path: Path) -> None:
    authority = LaunchAuthority()
    shake_hands(tmp_path, authority.make_identity(NAME), authority.make_identity(HEAD), NAME)


@pytest.mark.parametrize("stranger", ["server", "client"])
def test_another_launch_is_refused_by_either_end(tmp_path: Path, stranger: str) -> None:
    ours, theirs = LaunchAuthority(), LaunchAuthority()
    made = {"server": ours.make_identity(NAME), "client": ours.make_identity(HEAD)}
    stray = theirs.make_identity(NAME)
    # it knows our authority, which is no secret, so that only its own certificate is wrong
    made[stranger] = Identity(stray.key, stray.certificate, ours.certificate)
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(tmp_path, made["server"], made["client"], NAME)


def test_the_name_is_that_of_the_shard(tmp_path: Path) -> None:
    authority = LaunchAuthority()
    with pytest.raises(ssl.SSLCertVerificationError, match=r"stage1\.shard1"):
        shake_hands(tmp_path, authority.make_identity(NAME), authority.make_identity(HEAD), shard_name(1, 1))


def test_a_certificate_signs_no_others(tmp_path: Path) -> None:
    """Who holds a shard's key cannot make further members of the launch."""
    authority = LaunchAuthority()
    member = PrivateKey()
    certificate = authority.sign(member.request(), NAME)
    constraints = x509.load_pem_x509_certificate(certificate).extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    false_authority = LaunchAuthority()
    false_authority._key, false_authority._name = member._key, x509.load_pem_x509_certificate(certificate).subject
    key = PrivateKey()
    chain = false_authority.sign(key.request(), NAME) + certificate
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(tmp_path, key.identity(chain, authority.certificate), authority.make_identity(HEAD), NAME)


def test_the_authority_decides_about_the_name() -> None:
    certificate = x509.load_pem_x509_certificate(LaunchAuthority().sign(PrivateKey().request(), NAME))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == [NAME]


def test_what_is_no_request_is_refused() -> None:
    authority, request = LaunchAuthority(), PrivateKey().request()
    damaged = request.replace(request[60:64], b"AAAA", 1)
    for wrong in (b"", b"noise", authority.certificate, damaged):
        with pytest.raises(ValueError):
            authority.sign(wrong, NAME)


def test_the_key_is_not_shown() -> None:
    identity = LaunchAuthority().make_identity(HEAD)
    assert "PRIVATE KEY" in identity.key.decode()
    assert "PRIVATE" not in repr(identity)
