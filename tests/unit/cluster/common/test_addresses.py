"""Parts of an address, and what stays on this machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.common.addresses import is_loopback, split_address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost:7777", ("localhost", 7777)),
        ("10.0.0.1:0", ("10.0.0.1", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("::1:80", ("::1", 80)),
        ("host:65536", None),
        ("host:", None),
        (":80", None),
        ("[]:80", None),
        ("host", None),
        ("host:-1", None),
        ("host:8²", None),
        ("", None),
        ("unix:/run/head.sock", None),
    ],
)
def test_split_address(address: str, expected: tuple[str, int] | None) -> None:
    assert split_address(address) == expected


@given(st.text())
def test_any_text_is_an_address_or_none(text: str) -> None:
    where = split_address(text)
    assert where is None or (where[0] and 0 <= where[1] < 65536)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.com", False), ("", False),
        ("127.0.0.1.example.com", False), ("localhost.example.com", False), ("[::1]", False),
    ],
)  # fmt: skip
def test_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
