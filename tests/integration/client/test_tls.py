"""TLS, client certificates and API keys from the side of a client: what works, and what every mistake says."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import cluster
from cluster import AsyncClient, Client
from cluster.config.schema import SecuritySection
from cluster.server.state_files import HeadFiles
from tests.integration.conftest import CommandLine
from tests.integration.server.calls import eventually
from tests.support.data.certificates import Authority
from tests.support.fakes.jobs_api import FakeJobService, serving, write_secret
from tests.support.rigs.head import HeadProcess

KEY, WRONG_KEY = "k" * 32, "w" * 32


@dataclass
class Heads:
    """Heads by kind of security, and the files of their clients."""

    addresses: dict[str, str]
    security: dict[str, SecuritySection]
    files: dict[str, str]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Heads]:
    folder = tmp_path_factory.mktemp("tls")
    authority, clients, stranger = (Authority(folder, name) for name in ("authority", "clients", "stranger"))
    keys = write_secret(folder / "keys", f"team:{KEY}\n")

    def tls(pair: tuple[Path, Path], **rest: Path) -> SecuritySection:
        return SecuritySection(tls_cert_file=pair[0], tls_key_file=pair[1], **rest)

    head = authority.issue("head")
    security = {
        "plain": SecuritySection(),
        "keyed": SecuritySection(api_keys_file=keys),
        "tls": tls(head),
        "tls-keyed": tls(head, api_keys_file=keys),
        "mutual": tls(head, tls_client_ca_file=clients.file),
        "expired": tls(authority.issue("expired", hours=-1)),
        "elsewhere": tls(authority.issue("elsewhere", hosts=["head.example.org", "10.1.2.3"])),
    }
    files = {"ca": str(authority.file), "other-ca": str(stranger.file)}
    for name, pair in {
        "client": clients.issue("client"),
        "spy": stranger.issue("spy"),
        "late": clients.issue("late", hours=-1),
    }.items():
        files[f"{name}-cert"], files[f"{name}-key"] = map(str, pair)
    files["noise"] = str(write_secret(folder / "noise", b"\x00\xff noise"))
    files["absent"] = str(folder / "absent")
    running = [serving(FakeJobService(), section) for section in security.values()]
    addresses = {name: server.__enter__()[1] for name, server in zip(security, running, strict=True)}
    yield Heads(addresses, security, files)
    for server in running:
        server.__exit__(None, None, None)


def arguments(heads: Heads, **given: str) -> dict[str, str]:
    """Keyword arguments of a client: file names by their key in `Heads.files`."""
    return {name: heads.files.get(value, value) for name, value in given.items()}


MUTUAL = {"ca_file": "ca", "cert_file": "client-cert", "key_file": "client-key"}
WORKS = [
    ("plain", {}),
    ("keyed", {"api_key": KEY}),
    ("tls", {"ca_file": "ca"}),
    ("tls-keyed", {"ca_file": "ca", "api_key": KEY}),
    ("mutual", MUTUAL),
    ("elsewhere", {"ca_file": "ca", "server_name": "head.example.org"}),
]


@pytest.mark.parametrize(("head", "given"), WORKS)
def test_clients_that_are_let_in(heads: Heads, head: str, given: dict[str, str]) -> None:
    values = arguments(heads, **given)
    with Client(heads.addresses[head], **values) as client:  # type: ignore[arg-type]
        assert client.status().model == "fake"
        assert client.submit(prompt="a").id

    async def asynchronous() -> None:
        async with AsyncClient(heads.addresses[head], **values) as other:  # type: ignore[arg-type]
            assert (await other.status()).model == "fake"

    asyncio.run(asynchronous())


# (head, arguments of the client, type of the error, what it says)
REFUSED = [
    ("tls", {}, cluster.TlsError, "head speaks TLS.*--ca-file"),
    ("tls-keyed", {"api_key": KEY}, cluster.TlsError, "head speaks TLS.*--ca-file"),
    ("mutual", {}, cluster.TlsError, "head speaks TLS"),
    ("plain", {"ca_file": "ca"}, cluster.TlsError, "head speaks plain text.*leave out ca_file"),
    ("plain", MUTUAL, cluster.TlsError, "head speaks plain text"),
    ("tls", {"ca_file": "other-ca"}, cluster.TlsError, "not vouched for by ca_file .*stranger.pem.*--ca-file"),
    ("mutual", {"ca_file": "ca"}, cluster.TlsError, "wants a certificate of this client.*--cert-file and --key-file"),
    ("mutual", MUTUAL | {"cert_file": "spy-cert", "key_file": "spy-key"}, cluster.TlsError,
     "does not accept cert_file .*spy.crt.*tls_client_ca_file"),
    ("mutual", MUTUAL | {"cert_file": "late-cert", "key_file": "late-key"}, cluster.TlsError,
     "does not accept cert_file .*late.crt.*valid today"),
    ("expired", {"ca_file": "ca"}, cluster.TlsError, "certificate has expired: renew.*tls_cert_file"),
    ("elsewhere", {"ca_file": "ca"}, cluster.TlsError, "Hostname Verification Check failed.*--server-name"),
    ("keyed", {}, cluster.Unauthenticated, "an API key is needed: set LONGREACH_API_KEY"),
    ("keyed", {"api_key": WRONG_KEY}, cluster.Unauthenticated, "not one of the head's.*security.api_keys_file"),
    ("tls-keyed", {"ca_file": "ca"}, cluster.Unauthenticated, "an API key is needed"),
    ("tls-keyed", {"ca_file": "ca", "api_key": WRONG_KEY}, cluster.Unauthenticated, "not one of the head's"),
    ("tls", {"ca_file": "noise"}, cluster.InvalidRequest, "ca_file: .*noise: must be PEM certificates"),
    ("tls", {"ca_file": "absent"}, cluster.InvalidRequest, "ca_file: .*absent: cannot be read"),
    ("tls", MUTUAL | {"cert_file": "noise"}, cluster.InvalidRequest, "cert_file: .*noise: must be a PEM certificate"),
    ("tls", MUTUAL | {"key_file": "spy-key"}, cluster.InvalidRequest, "goes with key_file: .*spy.key"),
    ("tls", MUTUAL | {"key_file": "absent"}, cluster.InvalidRequest, "key_file: .*absent: cannot be read"),
    ("tls", {"cert_file": "client-cert"}, cluster.InvalidRequest, "key_file: .missing.*give both"),
    ("plain", {"api_key": "two words"}, cluster.InvalidRequest, "api_key: must be ASCII"),
    ("plain", {"api_key": "line\n"}, cluster.InvalidRequest, "api_key: must be ASCII"),
    ("plain", {"api_key": "schlüssel"}, cluster.InvalidRequest, "api_key: must be ASCII"),
]  # fmt: skip


@pytest.mark.parametrize(("head", "given", "kind", "said"), REFUSED)
def test_every_mistake_is_one_line_with_the_way_out(
    heads: Heads, head: str, given: dict[str, str], kind: type[Exception], said: str
) -> None:
    values = arguments(heads, **given)
    began = time.monotonic()
    with pytest.raises(kind, match=said) as caught, Client(heads.addresses[head], **values) as client:  # type: ignore[arg-type]
        client.submit(prompt="a")
    assert time.monotonic() - began < 5
    message = str(caught.value)
    assert "\n" not in message
    for secret in (KEY, WRONG_KEY, "two words"):
        assert secret not in message

    async def asynchronous() -> None:
        async with AsyncClient(heads.addresses[head], **values) as other:  # type: ignore[arg-type]
            await other.submit(prompt="a")

    with pytest.raises(kind, match=said):
        asyncio.run(asynchronous())


def test_files_and_key_from_the_environment(heads: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, name in (("CA_FILE", "ca"), ("CERT_FILE", "client-cert"), ("KEY_FILE", "client-key")):
        monkeypatch.setenv(f"LONGREACH_{variable}", heads.files[name])
    monkeypatch.setenv("LONGREACH_API_KEY", KEY)
    for head in ("tls", "tls-keyed", "mutual"):
        with Client(heads.addresses[head]) as client:
            assert client.status().model == "fake"
    none = {"ca_file": "", "cert_file": "", "key_file": ""}
    with Client(heads.addresses["plain"], **none) as client:  # type: ignore[arg-type]
        assert client.status().model == "fake"
    with pytest.raises(cluster.TlsError), Client(heads.addresses["tls"], ca_file=heads.files["other-ca"]) as client:
        client.status()


@pytest.mark.parametrize("head", ["plain", "tls", "elsewhere"])
def test_the_state_of_a_head_is_enough(
    heads: Heads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longreach: CommandLine, head: str
) -> None:
    """Also when the environment is made for another head."""
    monkeypatch.setenv("LONGREACH_CA_FILE", heads.files["other-ca"])
    files = HeadFiles(tmp_path)
    files.claim()
    files.announce(heads.addresses[head], heads.security[head])
    with Client.from_state(tmp_path) as client:
        assert client.status().model == "fake"

    async def asynchronous() -> None:
        async with AsyncClient.from_state(tmp_path) as other:
            assert (await other.status()).model == "fake"

    asyncio.run(asynchronous())
    done = longreach("status", "--data-dir", tmp_path, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["model"] == "fake"
    assert KEY not in (tmp_path / "head.json").read_text()


def test_a_head_that_wants_certificates_found_by_its_state(
    heads: Heads, tmp_path: Path, longreach: CommandLine
) -> None:
    files = HeadFiles(tmp_path)
    files.claim()
    files.announce(heads.addresses["mutual"], heads.security["mutual"])
    pair = {"cert_file": heads.files["client-cert"], "key_file": heads.files["client-key"]}
    with Client.from_state(tmp_path, **pair) as client:  # type: ignore[arg-type]
        assert client.status().model == "fake"
    done = longreach("jobs", "--data-dir", tmp_path)
    assert done.code == 2
    assert "wants a certificate" in done.err
    flags = ["--cert-file", pair["cert_file"], "--key-file", pair["key_file"]]
    assert longreach("jobs", "--data-dir", tmp_path, *flags).code == 0


CLI = [
    ("tls", [], 2, "head speaks TLS"),
    ("plain", ["--ca-file", "ca"], 2, "head speaks plain text"),
    ("tls", ["--ca-file", "other-ca"], 2, "not vouched for"),
    ("tls", ["--ca-file", "absent"], 2, "cannot be read"),
    ("mutual", ["--ca-file", "ca"], 2, "wants a certificate"),
    ("mutual", ["--ca-file", "ca", "--cert-file", "spy-cert", "--key-file", "spy-key"], 2, "does not accept cert_file"),
    ("elsewhere", ["--ca-file", "ca"], 2, "--server-name"),
    ("keyed", [], 2, "LONGREACH_API_KEY"),
    ("mutual", ["--ca-file", "ca", "--cert-file", "client-cert", "--key-file", "client-key"], 0, ""),
    ("elsewhere", ["--ca-file", "ca", "--server-name", "head.example.org"], 0, ""),
]


@pytest.mark.parametrize(("head", "flags", "code", "said"), CLI)
def test_flags_and_exit_codes(
    heads: Heads, longreach: CommandLine, head: str, flags: list[str], code: int, said: str
) -> None:
    done = longreach("status", "--address", heads.addresses[head], *(heads.files.get(flag, flag) for flag in flags))
    assert done.code == code, done.err
    assert done.err.count("\n") == (code != 0), done.err
    assert said in done.err
    assert not code or done.err.startswith("longreach: error: ")


def test_a_real_head_behind_tls_and_keys(
    tmp_path: Path, longreach: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started from YAML; the verbs of this machine need the key and no flag."""
    certificate, key = Authority(tmp_path, "authority").issue("head", hosts=["head.example.org"])
    keys = write_secret(tmp_path / "keys", KEY)
    security = f"security: {{api_keys_file: {keys}, tls_cert_file: {certificate}, tls_key_file: {key}}}"
    with HeadProcess(tmp_path, server=security) as head:
        data = ["--data-dir", str(head.data)]
        done = longreach("status", *data)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "LONGREACH_API_KEY" in done.err
        done = longreach("status", "--address", f"127.0.0.1:{head.port}")
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert "head speaks TLS" in done.err
        monkeypatch.setenv("LONGREACH_API_KEY", KEY)
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("The secret code of dark river is")
        submit = ["submit", "--prompt-file", str(prompt), "--max-tokens", "4", "--ignore-eos"]
        done = longreach(*submit, "--stream", *data)
        assert done.code == 0, done.err
        assert done.out.strip()
        flags = ["--ca-file", str(certificate), "--server-name", "head.example.org"]
        done = longreach(*submit, "--wait", "--address", f"127.0.0.1:{head.port}", *flags)
        assert done.code == 0, done.err
        with Client.from_state(head.data) as client:
            assert len(list(client.jobs(["succeeded"]))) == 2
        made = longreach("keys", "create", "law", "--file", str(keys))
        monkeypatch.setenv("LONGREACH_API_KEY", made.out.strip())
        assert eventually(lambda: longreach("status", *data).code == 0)
        with Client.from_state(head.data) as client:
            assert list(client.jobs()) == [], "those of another key"
        assert longreach("keys", "revoke", "law", "--file", str(keys)).code == 0
        assert eventually(lambda: longreach("status", *data).code == 2)
    audit = (head.data / "log" / "audit.jsonl").read_text()
    actions = [json.loads(line)["action"] for line in audit.splitlines()]
    assert actions[0] == "key_refused"
    assert [one for one in actions if one != "key_refused"] == ["submit", "submit", "key_added", "key_revoked"]


def test_a_key_does_not_travel_in_plain_text(longreach: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_API_KEY", KEY)
    done = longreach("status", "--address", "192.0.2.1:7777")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "plain text" in done.err
    assert "--allow-plaintext-key" in done.err
    assert KEY not in done.err
