"""The TCP port of a stage process: who is let in with mutual TLS, and what the others are told."""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from collections.abc import Iterator
from concurrent import futures
from contextlib import closing
from pathlib import Path

import grpc
import pytest
import torch

from cluster.common.errors import StageError
from cluster.config.topology import plan_shards
from cluster.stages.handle import GrpcStageHandle
from protos.model.config_json import load_model_spec
from protos.stage import stage_pb2 as pb
from protos.stage import stage_pb2_grpc as rpc
from protos.stage.channel import CHANNEL_OPTIONS, TokenInterceptor, add_tcp_port, token_metadata
from protos.stage.identity import HEAD, Identity, LaunchAuthority, shard_name
from protos.stage.messages import StageProcessSpec
from tests.support.paths import ROOT
from workers.stage.server import StageServer
from workers.transport.link import GrpcSender, Inbox, LinkClosed

TOKEN = "f" * 64
SHARD = plan_shards(load_model_spec(ROOT / "configs" / "needle"), 2, 1)[1]
NAME = shard_name(1, 0)
AUTHORITY, STRANGERS = LaunchAuthority(), LaunchAuthority()
HEAD_IDENTITY = AUTHORITY.make_identity(HEAD)
STRAY = STRANGERS.make_identity(HEAD)
FOREIGN = Identity(STRAY.key, STRAY.certificate, AUTHORITY.certificate)  # knows our authority, which is no secret


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lr", ignore_cleanup_errors=True) as made:
        yield Path(made)


def listen(folder: Path, identity: Identity | None) -> Iterator[str]:
    """Yield the TCP address of a shard that has loaded nothing."""
    server = StageServer(StageProcessSpec(TOKEN, str(folder / "run" / "s.sock"), listen_tcp=True), identity)
    address = server.start("node", "127.0.0.1")
    assert address.pid == os.getpid()
    yield address.tcp
    with closing(grpc.insecure_channel(address.unix)) as channel:
        rpc.StageStub(channel).Close(pb.CloseRequest(), metadata=token_metadata(TOKEN), timeout=30)
    server.wait()


@pytest.fixture
def secure(folder: Path) -> Iterator[str]:
    yield from listen(folder, AUTHORITY.make_identity(NAME))


@pytest.fixture
def plain(folder: Path) -> Iterator[str]:
    yield from listen(folder, None)


def probe(address: str, identity: Identity | None, token: str = TOKEN) -> str:
    handle = GrpcStageHandle(SHARD, address, token, identity)
    try:
        return str(handle.probe(30).state)
    finally:
        handle.abandon()


def refusal(address: str, identity: Identity | None, token: str = TOKEN) -> str:
    with pytest.raises(StageError) as caught:
        probe(address, identity, token)
    said = str(caught.value)
    assert said.startswith("stage 1 shard 0: ")
    assert "\n" not in said
    return said


def test_a_member_of_the_launch_is_let_in(secure: str) -> None:
    assert probe(secure, HEAD_IDENTITY) == "created"


def test_a_member_without_the_token_is_refused(secure: str) -> None:
    assert "wrong token" in refusal(secure, HEAD_IDENTITY, "wrong")


@pytest.mark.parametrize("who", ["foreign", "plain"])
def test_the_token_alone_opens_nothing(secure: str, who: str) -> None:
    said = refusal(secure, FOREIGN if who == "foreign" else None)
    mine = "does not accept the certificate of this process" if who == "foreign" else "accepts only TLS"
    assert f"{secure} has ended the connection, is gone, or {mine} (cluster.inter_node_tls)" in said


def test_a_client_without_any_certificate_is_refused(secure: str) -> None:
    credentials = grpc.ssl_channel_credentials(AUTHORITY.certificate)
    options = [("grpc.ssl_target_name_override", NAME)]
    with closing(grpc.secure_channel(secure, credentials, options)) as channel, pytest.raises(grpc.RpcError) as caught:
        rpc.StageStub(channel).Probe(pb.ProbeRequest(), metadata=token_metadata(TOKEN), timeout=30)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_old_versions_of_tls_are_refused(secure: str) -> None:
    host, _, port = secure.rpartition(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection((host, int(port)), 30) as end, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(end)


def test_the_head_refuses_processes_of_other_launches(folder: Path) -> None:
    for address in listen(folder, STRANGERS.make_identity(NAME)):
        said = refusal(address, HEAD_IDENTITY)
        assert f"cluster.inter_node_tls: {address} is refused: its certificate is of another launch" in said


def test_the_head_refuses_another_shard(folder: Path) -> None:
    for address in listen(folder, AUTHORITY.make_identity(shard_name(0, 0))):
        said = refusal(address, HEAD_IDENTITY)
        assert f"cluster.inter_node_tls: {address} is refused: its certificate is that of another shard" in said


def test_the_head_refuses_plain_text(plain: str) -> None:
    said = refusal(plain, HEAD_IDENTITY)
    assert f"cluster.inter_node_tls: {plain} is refused: it does not speak TLS" in said


def test_plain_text_when_it_is_asked_for(plain: str) -> None:
    assert probe(plain, None) == "created"


class Receiver(rpc.StageServicer):
    """The receiving end of a link."""

    def __init__(self) -> None:
        self.inbox = Inbox()

    def Activations(self, frames, context):
        reason, _ = self.inbox.feed(frame.data for frame in frames)
        context.abort(grpc.StatusCode.CANCELLED, reason)


@pytest.fixture
def receiver() -> Iterator[tuple[Inbox, str]]:
    made = Receiver()
    server = grpc.server(futures.ThreadPoolExecutor(4), interceptors=[TokenInterceptor(TOKEN)], options=CHANNEL_OPTIONS)
    rpc.add_StageServicer_to_server(made, server)
    address = add_tcp_port(server, "127.0.0.1", AUTHORITY.make_identity(NAME))
    server.start()
    yield made.inbox, address
    made.inbox.close()
    server.stop(0).wait()


def test_a_link_carries_tensors(receiver: tuple[Inbox, str]) -> None:
    inbox, address = receiver
    sender = GrpcSender(address, TOKEN, identity=HEAD_IDENTITY, name=NAME)
    for step, shape in enumerate([(1, 2048), (193, 2048), (4096, 2048)]):
        tensor = torch.randn(shape).bfloat16()
        sender.send(step, tensor)
        assert torch.equal(inbox.take(step, 60.0, shape, torch.bfloat16), tensor)
    sender.close()
    with pytest.raises(LinkClosed, match="gone"):
        inbox.take(3, 60.0, (1, 1), torch.bfloat16)


@pytest.mark.parametrize(
    ("identity", "name", "said"),
    [
        (FOREIGN, NAME, "does not accept the certificate of this process"),
        (STRAY, NAME, "its certificate is of another launch"),
        (HEAD_IDENTITY, shard_name(0, 0), "its certificate is that of another shard"),
        (None, NAME, "accepts only TLS"),
    ],
    ids=["foreign", "stray", "other-shard", "plain"],
)  # fmt: skip
def test_a_link_to_or_from_a_stranger_is_refused(
    receiver: tuple[Inbox, str], identity: Identity | None, name: str, said: str
) -> None:
    sender = GrpcSender(receiver[1], TOKEN, identity=identity, name=name)

    def send() -> None:
        while True:  # it is told as soon as the connection has failed
            sender.send(0, torch.zeros(1 << 20))

    with pytest.raises(LinkClosed, match="link to the next stage broke") as caught:
        send()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
