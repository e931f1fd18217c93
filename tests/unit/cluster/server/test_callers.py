"""Who makes a call; with real calls it is in tests/integration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.access.call_pool import KeyRefused
from cluster.access.keys import ApiKeys, key_id
from cluster.jobs.tenants.tenant import ANYONE
from cluster.server.callers import Callers, tenant_of

KEY = "0123456789abcdef"


def context(peer: str, *authorization: str) -> SimpleNamespace:
    metadata = [("authorization", value) for value in authorization]
    return SimpleNamespace(peer=lambda: peer, invocation_metadata=lambda: metadata)


@pytest.mark.parametrize(
    ("peer", "given", "name"),
    [
        ("ipv4:10.0.0.1:5000", [f"Bearer {KEY}"], "key team a"),
        ("ipv4:10.0.0.1:5000", [], "ipv4:10.0.0.1"),
        ("ipv4:10.0.0.1:5000", ["Bearer wrong"], "ipv4:10.0.0.1"),
        ("ipv4:10.0.0.1:5000", [f"Bearer {KEY}"] * 2, "ipv4:10.0.0.1"),
        ("ipv6:%5B::1%5D:5000", [], "ipv6:%5B::1%5D"),
        ("unix:", [], "unix:"),
    ],
)
def test_callers(peer: str, given: list[str], name: str) -> None:
    caller = Callers(ApiKeys({KEY: "team a"})).identify(context(peer, *given))  # type: ignore[arg-type]
    assert (caller.name, caller.peer) == (name, peer)


def test_without_keys_callers_are_hosts() -> None:
    caller = Callers(None).identify(context("ipv4:10.0.0.1:5000", f"Bearer {KEY}"))  # type: ignore[arg-type]
    assert str(caller) == "ipv4:10.0.0.1 at ipv4:10.0.0.1:5000"


def test_a_call_without_a_key_is_nobodys_where_there_are_keys() -> None:
    keys = ApiKeys({KEY: "team a"})
    known = Callers(keys).identify(context("ipv4:10.0.0.1:5000", f"Bearer {KEY}"))  # type: ignore[arg-type]
    assert (tenant_of(known).name, known.key_id) == ("team a", key_id(KEY))
    with pytest.raises(KeyRefused):
        tenant_of(Callers(keys).identify(context("ipv4:10.0.0.1:5000")))  # type: ignore[arg-type]
    assert tenant_of(Callers(None).identify(context("ipv4:10.0.0.1:5000"))) == ANYONE  # type: ignore[arg-type]
