"""Faults of connections: between stages, between clients and head, without keys, without TLS."""

from __future__ import annotations

import datetime
import ipaddress
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from cluster.bench.faults.proxy import Address, Proxy, Way, swap_once
from cluster.bench.faults.rig import FaultHead, Rig, Running, Verdict, mixed_jobs
from cluster.bench.head_process import until
from cluster.bench.history import History
from cluster.client.client import Client
from cluster.client.errors import LongreachError, TlsError, Unauthenticated
from cluster.server.grpc_server import JOBS_SERVICE
from protos.jobs import jobs_pb2 as pb

_HEADER_BYTES, _SIZE = 64, struct.Struct("<4xI")  # of a frame between stages, see workers/transport/frames.py
_KEY = "k" * 32
# run by the head before all else: stage 0 is told the proxy's socket, and the proxy the one of stage 1
_THROUGH_PROXY = """
import pathlib, cluster.stages.launcher as launcher
folder, plain = pathlib.Path({folder!r}), launcher.links_of
def links_of(shard, *rest):
    links = plain(shard, *rest)
    if shard.stage == 0 and links.get("downstream_socket"):
        (folder / "target").write_text(links["downstream_socket"])
        links["downstream_socket"] = str(folder / "link.sock")
    return links
launcher.links_of = links_of
from cluster.cli.main import main
main(prog_name="longreach")
"""


@contextmanager
def _head_with_proxy(rig: Rig) -> Iterator[tuple[FaultHead, Proxy]]:
    """Yield a head of two stages whose hidden states pass a proxy."""
    with rig.fresh(2, 1) as head:
        target = head.folder / "target"
        path = str(head.folder / "link.sock")
        head.command = [sys.executable, "-c", _THROUGH_PROXY.format(folder=str(head.folder))]
        with Proxy(path, target.read_text) as proxy:
            head.start()
            head.wait_until_running()
            yield head, proxy


def partition_between_stages(rig: Rig, seed: int) -> Verdict:
    """The link between two stages is cut, cannot be made again for a while, and then is slow."""
    draw, history, verdict = random.Random(seed), History(), Verdict()
    requests = mixed_jobs(seed)
    with _head_with_proxy(rig) as (head, proxy):
        with Running(head.address, history, requests, seed) as running:
            running.until_progress("long", draw.randrange(256, 2500))
            proxy.refusing = True
            verdict.facts["cut_links"] = proxy.cut()
            time.sleep(draw.uniform(0.5, 4.0))
            proxy.heal()
            proxy.delay_s = 0.02
        verdict.facts["bytes"] = proxy.passed["out"]
    verdict.expect(verdict.facts["cut_links"], "no link went through the proxy")
    return rig.judge(verdict, history, requests)


def _frame_size(head: bytes) -> int | None:
    return _HEADER_BYTES + int(_SIZE.unpack_from(head)[0]) if len(head) >= _HEADER_BYTES else None


def reordering_between_stages(rig: Rig, seed: int) -> Verdict:
    """Two messages between stages change places: the stage that gets them refuses the first, and no token is wrong."""
    draw, history, verdict = random.Random(seed), History(), Verdict()
    requests = mixed_jobs(seed)
    with _head_with_proxy(rig) as (head, proxy):
        with Running(head.address, history, requests, seed) as running:
            running.until_progress("long", draw.randrange(256, 2000))
            proxy.swap = swap_once(_frame_size)
            until(lambda: any(e.restarts for e in history.of("state")) or running.ended("long"), "a restart")
            proxy.swap = None
        log = head.log.read_text(errors="replace")
        verdict.expect("came where step" in log, "no stage noticed that messages had changed places")
        verdict.expect(proxy.passed["out"], "nothing went through the proxy")
    return rig.judge(verdict, history, requests)


def _lossy_client(rig: Rig, seed: int, ways: Sequence[Way], cut: bool) -> Verdict:
    """Run jobs whose clients reach the head through a proxy that loses what they send or get, again and again."""
    draw, history, verdict = random.Random(seed), History(), Verdict()
    head = rig.head()
    requests = mixed_jobs(seed, 3000)
    target: Address = ("127.0.0.1", head.port)
    rounds = 12 if rig.full else 4
    with Proxy(("127.0.0.1", 0), lambda: target) as proxy:
        proxy.lost = set(ways)  # the very first calls are lost
        losing = _Losing(proxy, draw, ways, rounds, cut)
        losing.start()
        host, port = proxy.address  # type: ignore[str-unpack]
        with Running(f"{host}:{port}", history, requests, seed):
            pass
        losing.join()
        verdict.facts |= {"rounds": losing.done, "bytes": dict(proxy.passed)}
    codes = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}
    return rig.judge(verdict, history, requests, codes=codes, most_restarts=0)


class _Losing(threading.Thread):
    """Loses bytes for a moment, then cuts all connections, a number of times."""

    def __init__(self, proxy: Proxy, draw: random.Random, ways: Sequence[Way], rounds: int, cut: bool) -> None:
        super().__init__(name="losing", daemon=True)
        self._proxy, self._draw, self._ways, self._rounds, self._cut = proxy, draw, ways, rounds, cut
        self.done = 0

    def run(self) -> None:
        for _ in range(self._rounds):
            time.sleep(self._draw.uniform(0.05, 0.8))
            if self._cut:
                self._proxy.cut()
            else:
                self._proxy.heal()
                time.sleep(self._draw.uniform(0.5, 1.5))
                self._proxy.lost = set(self._ways)
            self.done += 1
        self._proxy.heal()


def rpc_lost_on_request(rig: Rig, seed: int) -> Verdict:
    """Requests vanish on their way to the head."""
    return _lossy_client(rig, seed, ["out"], cut=False)


def rpc_lost_on_reply(rig: Rig, seed: int) -> Verdict:
    """The head hears everything, its replies vanish: what was submitted twice must be one job."""
    return _lossy_client(rig, seed, ["back"], cut=False)


def rpc_cut_in_flight(rig: Rig, seed: int) -> Verdict:
    """Connections are reset at random moments, in the middle of calls and streams."""
    return _lossy_client(rig, seed, [], cut=True)


def _certificate(folder: Path) -> tuple[Path, Path]:
    """Write a certificate for this machine that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "faults")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    paths = folder / "head.pem", folder / "head.key"
    for path, content in zip(paths, (signed.public_bytes(serialization.Encoding.PEM), secret), strict=True):
        path.touch(0o600)
        path.write_bytes(content)
    return paths


def _secured(rig: Rig) -> tuple[FaultHead, Path]:
    """Return a running head with a key and TLS, and its certificate."""
    folder = rig.folder / "secrets"
    if not folder.exists():
        folder.mkdir(mode=0o700)
        (folder / "keys").touch(0o600)
        (folder / "keys").write_text(f"team:{_KEY}\n")
        _certificate(folder)
    names = {"api_keys_file": "keys", "tls_cert_file": "head.pem", "tls_key_file": "head.key"}
    security = {name: str(folder / file) for name, file in names.items()}
    return rig.head(1, 1, security=security), folder / "head.pem"


def wrong_api_keys(rig: Rig, seed: int) -> Verdict:
    """Every method without a key, with a wrong one, with an empty one: UNAUTHENTICATED; with the right one: not."""
    draw, verdict = random.Random(seed), Verdict()
    head, certificate = _secured(rig)
    methods = [f"/{JOBS_SERVICE}/{method.name}" for method in pb.DESCRIPTOR.services_by_name["Jobs"].methods]
    methods += ["/grpc.health.v1.Health/List", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
    methods.append(f"/{JOBS_SERVICE}/Nothing")
    wrong = ["", "wrong", _KEY[:-1], _KEY + "k", _KEY.upper(), "team:" + _KEY, draw.randbytes(16).hex()]
    metadata = [[], [("authorization", "")], [("authorization", _KEY)], [("x-api-key", _KEY)]]
    metadata += [[("authorization", f"Bearer {key}")] for key in wrong]
    credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(head.address, credentials) as channel:
        for method in methods:
            for given in metadata:
                code = _code(channel, method, given)
                verdict.expect(code == "UNAUTHENTICATED", f"{method} with {given}: {code}")
            code = _code(channel, method, [("authorization", f"Bearer {_KEY}")])
            verdict.expect(code not in ("UNAUTHENTICATED", "INTERNAL", "UNKNOWN"), f"{method} with the key: {code}")
    for key in (None, "wrong" * 4):
        with Client(head.address, api_key=key, ca_file=certificate) as client:
            verdict.expect(_error(client) is Unauthenticated, f"the client with key {key}: {_error(client)}")
    with Client(head.address, api_key=_KEY, ca_file=certificate) as client:
        verdict.expect(_error(client) is None, f"the client with the key: {_error(client)}")
    verdict.facts = {"methods": len(methods), "calls": len(methods) * (len(metadata) + 1)}
    return verdict


def _code(channel: grpc.Channel, method: str, metadata: list[tuple[str, str]]) -> str:
    call = channel.stream_stream(method)(iter([b""]), metadata=metadata, timeout=10)
    try:
        next(call, None)
        call.cancel()
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def _error(client: Client) -> type[LongreachError] | None:
    try:
        client.status()
    except LongreachError as error:
        return type(error)
    return None


def plaintext_to_tls(rig: Rig, seed: int) -> Verdict:
    """Clients without TLS, and noise, at a port with TLS: refused at once with a reason; others are served."""
    draw, verdict = random.Random(seed), Verdict()
    head, certificate = _secured(rig)
    began = time.monotonic()
    with Client(head.address, api_key=_KEY) as client:
        verdict.expect(_error(client) is TlsError, f"a client without TLS: {_error(client)}")
    verdict.facts["refused_after_s"] = round(time.monotonic() - began, 2)
    for start in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00"):
        for _ in range(20 if rig.full else 3):
            with socket.create_connection(("127.0.0.1", head.port), timeout=5) as connection:
                connection.sendall(start + draw.randbytes(draw.randint(1, 2000)))
    with Client(head.address, api_key=_KEY, ca_file=certificate) as client:
        job = client.submit(prompt="Once", max_tokens=3, temperature=0.0)
        verdict.expect(job.wait(60).state == "succeeded", f"a job afterwards: {job.state}")
    return verdict
