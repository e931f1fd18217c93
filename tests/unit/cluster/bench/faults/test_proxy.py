"""What swaps the order of frames; the proxy itself is used by tests/faults."""

from __future__ import annotations

from cluster.bench.faults.proxy import swap_once


def size_of(head: bytes) -> int | None:
    return head[0] if head else None


def test_two_frames_change_places_once() -> None:
    swap = swap_once(size_of)
    assert swap(b"\x03ab") == []
    assert swap(b"\x02") == []
    assert b"".join(swap(b"x\x02")) == b"\x02x\x03ab\x02"
    assert swap(b"y\x03cd\x02z") == [b"y\x03cd\x02z"]


def test_more_frames_at_once_keep_their_order_behind_the_first_two() -> None:
    assert b"".join(swap_once(size_of)(b"\x01\x02a\x03bc")) == b"\x02a\x01\x03bc"
