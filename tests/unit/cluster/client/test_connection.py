"""Where a head is and how to talk to it: arguments, environment, keys in plain text, the state file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import cluster
from cluster.client.client import Client
from cluster.client.connection import DEFAULT_DATA_DIR, Connection, last_failure, read_state
from cluster.config.schema import Config


def test_connection_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGREACH_API_KEY", "outer")
    assert Connection().secret == "outer"
    assert Connection(api_key="inner").secret == "inner"
    assert Connection(api_key="").secret == ""
    files = [{"cert_file": "c"}, {"key_file": "k"}]
    addresses = [{"address": address} for address in ("", "host", ":7", "h:x", "h:")]
    for wrong in (*files, *addresses, {"timeout_s": 0}, {"timeout_s": float("nan")}):
        values: Any = wrong
        with pytest.raises(cluster.InvalidRequest):
            Connection(**values)


KEYED = "k" * 16


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1:7777", True), ("127.1.2.3:1", True), ("localhost:1", True), ("[::1]:1", True),
        ("unix:/tmp/s", True),
        ("10.0.0.1:7777", False), ("head.example.org:1", False), ("[::]:1", False), ("0.0.0.0:1", False),
        ("localhost.example.org:1", False), ("dns:///127.0.0.1:1", False),
    ],
)  # fmt: skip
def test_a_key_travels_in_plain_text_only_on_this_machine_or_when_told(
    address: str, is_local: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    Connection(address)
    Connection(address, KEYED, ca_file="ca.pem")
    Connection(address, KEYED, allow_plaintext_key=True)
    for outer in ("", KEYED):
        monkeypatch.setenv("LONGREACH_API_KEY", outer)
        if is_local:
            Connection(address, KEYED)
            continue
        with pytest.raises(cluster.InvalidRequest, match=r"plain text.*ca_file.*allow_plaintext_key=True") as caught:
            Connection(address, None if outer else KEYED)
        assert KEYED not in str(caught.value)
        with pytest.raises(cluster.InvalidRequest):
            Client(address, None if outer else KEYED)


@pytest.mark.parametrize("text", ["[]", "{", '{"address": "x"}', '{"address": "x", "pid": "y", "started": 1}', "7"])
def test_broken_state_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(cluster.Unavailable, match="longreach up"):
        read_state(tmp_path)


def test_default_data_dir_is_that_of_the_configuration() -> None:
    assert Config.model_fields["data_dir"].default == DEFAULT_DATA_DIR


def test_what_a_head_ended_with_is_found_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log" / "head.log"
    assert last_failure(tmp_path) == ""
    log.parent.mkdir()
    for text, found in (
        ("", ""),
        (
            "head ready at x\n" * 999 + "longreach: error: the recorder thread has ended\n",
            "the recorder thread has ended",
        ),
        ("longreach: error: old\nhead ready at x\n", ""),
    ):
        log.write_text(text)
        assert last_failure(tmp_path) == found
        with pytest.raises(cluster.Unavailable, match=f"the last head ended: {found}" if found else "longreach up"):
            read_state(tmp_path)
