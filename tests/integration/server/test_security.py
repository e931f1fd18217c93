"""API keys and TLS of the gRPC server: every method of every service, every way to be without the right key."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.access.audit import AuditLog
from cluster.common.errors import PreflightError
from cluster.config.schema import SecuritySection
from cluster.server.grpc_server import SERVICES
from cluster.server.security import OPEN_METHODS
from protos.jobs import jobs_pb2 as pb
from protos.jobs import jobs_pb2_grpc as rpc
from tests.integration.server.calls import code_of, every_method, pieces
from tests.support.data.certificates import Authority
from tests.support.fakes.jobs_api import FakeJobService, channel_to, serving, write_secret

Code = grpc.StatusCode


KEY, OTHER = "k" * 32, "o" * 16


def key_metadata(key: str) -> list[tuple[str, str]]:
    """What a client sends with every call."""
    return [("authorization", f"Bearer {key}")]


WRONG: list[list[tuple[str, str]]] = [
    [],
    [("authorization", "")],
    [("authorization", "Bearer ")],
    [("authorization", KEY)],
    [("authorization", f"Basic {KEY}")],
    [("x-api-key", KEY)],
    *([*key_metadata(key)] for key in ("", "wrong", KEY[:-1], KEY + "k", KEY.upper(), f"team:{KEY}")),
    [*key_metadata(KEY), *key_metadata("wrong")],
]


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[tuple[FakeJobService, grpc.Channel]]:
    service = FakeJobService()
    keys = write_secret(tmp_path / "keys", f"# keys\nteam:{KEY}\n{OTHER} admin\n")
    audit = AuditLog(tmp_path / "audit.jsonl")
    security = SecuritySection(api_keys_file=keys)
    with serving(service, security, audit=audit) as (_, address), channel_to(address) as channel:
        yield service, channel


def status_of(channel: grpc.Channel, path: str, metadata: list[tuple[str, str]]) -> grpc.StatusCode:
    try:
        call = channel.stream_stream(path)(iter([b""]), metadata=metadata, timeout=10)
        next(call, None)  # Watch would never end
        call.cancel()
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_no_method_answers_without_the_right_key(locked: tuple[FakeJobService, grpc.Channel]):
    service, channel = locked
    paths = every_method(channel, key_metadata(KEY))
    assert {path.split("/")[1] for path in paths} == set(SERVICES)
    assert len(paths) >= 12 + 2 + 1
    assert set(paths) >= OPEN_METHODS
    for path in [*paths, "/longreach.jobs.v1.Jobs/Nothing", "/nobody.Service/Method"]:
        for metadata in WRONG:
            expected = path not in OPEN_METHODS
            assert (status_of(channel, path, metadata) is Code.UNAUTHENTICATED) is expected, (path, metadata)
        assert status_of(channel, path, key_metadata(KEY)) is not Code.UNAUTHENTICATED
    assert not service.records


def test_every_key_of_the_file_opens(locked: tuple[FakeJobService, grpc.Channel], caplog: pytest.LogCaptureFixture):
    service, channel = locked
    caplog.set_level("DEBUG")
    stub = rpc.JobsStub(channel)
    for key in (KEY, OTHER):
        assert stub.Submit(pb.SubmitRequest(prompt="a"), metadata=key_metadata(key)).id in service.records
    service.error = RuntimeError("broken")
    with pytest.raises(grpc.RpcError):
        stub.Submit(pb.SubmitRequest(prompt="a"), metadata=key_metadata(KEY))
    assert KEY not in caplog.text
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_the_log_names_the_key_that_did_what(
    locked: tuple[FakeJobService, grpc.Channel], caplog: pytest.LogCaptureFixture, tmp_path: Path
):
    _, channel = locked
    caplog.set_level("DEBUG")
    stub = rpc.JobsStub(channel)
    job_id = stub.Submit(pb.SubmitRequest(prompt="a secret text"), metadata=key_metadata(KEY)).id
    document_id = stub.UploadDocument(pieces(b"x"), metadata=key_metadata(OTHER)).id
    stub.Get(pb.JobRequest(id=job_id), metadata=key_metadata(OTHER))
    stub.Cancel(pb.JobRequest(id=job_id), metadata=key_metadata(OTHER))
    stub.Delete(pb.JobRequest(id=job_id), metadata=key_metadata(KEY))
    stub.DeleteDocument(pb.DocumentRequest(id=document_id), metadata=key_metadata(OTHER))
    for _ in range(5):
        assert code_of(lambda: stub.Submit(pb.SubmitRequest(), metadata=key_metadata("wrong")))[0] is (
            Code.UNAUTHENTICATED
        )
    text = (tmp_path / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    other = f"sha256:{hashlib.sha256(OTHER.encode()).hexdigest()[:8]}"
    assert [(line["action"], line["subject"], line.get("key")) for line in lines] == [
        ("submit", job_id, "team"), ("upload_document", document_id, other), ("cancel", job_id, other),
        ("delete", job_id, "team"), ("delete_document", document_id, other),
        ("key_refused", "/longreach.jobs.v1.Jobs/Submit", None),
    ]  # fmt: skip
    for secret in (KEY, OTHER, "secret"):
        assert secret not in caplog.text + text


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def tls(authority: Authority, client: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
    certificate, key = (path.read_bytes() for path in client) if client else (None, None)
    return grpc.ssl_channel_credentials(authority.certificate, key, certificate)


def submit(address: str, credentials: grpc.ChannelCredentials | None, metadata: list[tuple[str, str]] | None = None):
    with channel_to(address, credentials) as channel:
        return rpc.JobsStub(channel).Submit(pb.SubmitRequest(prompt="a"), metadata=metadata, timeout=10)


def refused(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        submit(address, credentials)
    return caught.value.code()


def test_tls_and_plaintext(tmp_path: Path, authority: Authority):
    certificate, key = authority.issue("head")
    stranger = Authority(tmp_path, "stranger")
    keys = write_secret(tmp_path / "keys", KEY)
    security = SecuritySection(api_keys_file=keys, tls_cert_file=certificate, tls_key_file=key)
    with serving(FakeJobService(), security) as (_, address):
        assert submit(address, tls(authority), key_metadata(KEY)).id
        assert refused(address, None) is Code.UNAVAILABLE  # plaintext to the TLS port
        assert refused(address, tls(stranger)) is Code.UNAVAILABLE
        assert refused(address, tls(authority)) is Code.UNAUTHENTICATED
        assert submit(address, tls(authority), key_metadata(KEY)).id


def test_tls_to_a_plaintext_port(authority: Authority):
    with serving(FakeJobService()) as (_, address):
        assert refused(address, tls(authority)) is Code.UNAVAILABLE
        assert submit(address, None).id


def test_clients_need_a_certificate_of_the_authority(tmp_path: Path, authority: Authority):
    certificate, key = authority.issue("head")
    clients, stranger = Authority(tmp_path, "clients"), Authority(tmp_path, "stranger")
    security = SecuritySection(tls_cert_file=certificate, tls_key_file=key, tls_client_ca_file=clients.file)
    with serving(FakeJobService(), security) as (_, address):
        assert submit(address, tls(authority, clients.issue("client"))).id
        assert refused(address, tls(authority)) is Code.UNAVAILABLE
        assert refused(address, tls(authority, stranger.issue("spy"))) is Code.UNAVAILABLE
        assert submit(address, tls(authority, clients.issue("client"))).id


def test_bad_certificates_are_refused_at_start(tmp_path: Path, authority: Authority):
    certificate, key = authority.issue("head")
    _, other_key = authority.issue("other")
    noise = write_secret(tmp_path / "noise", b"\x00\xff noise")
    readable = write_secret(tmp_path / "open.key", key.read_bytes(), 0o644)
    for changes, said in [
        ({"tls_key_file": other_key}, "security.tls_cert_file.*goes with security.tls_key_file"),
        ({"tls_cert_file": noise}, "security.tls_cert_file"),
        ({"tls_key_file": noise}, "security.tls_key_file"),
        ({"tls_key_file": tmp_path / "absent"}, "security.tls_key_file.*cannot be read"),
        ({"tls_cert_file": tmp_path / "absent"}, "security.tls_cert_file.*cannot be read"),
        ({"tls_key_file": readable}, "security.tls_key_file.*mode 644.*chmod 600"),
        ({"tls_client_ca_file": noise}, "security.tls_client_ca_file"),
    ]:
        security = SecuritySection(**({"tls_cert_file": certificate, "tls_key_file": key} | changes))
        with pytest.raises(PreflightError, match=said) as caught, serving(FakeJobService(), security):
            pass
        assert len(str(caught.value).splitlines()) == 1
