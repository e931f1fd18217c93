"""Offers come in order, in runs of one prompt, each once."""

from __future__ import annotations

import threading
from array import array

import pytest

from cluster.kv_store import backlog as module
from cluster.kv_store.backlog import Backlog
from cluster.scheduler.stored_prefix import Offer


def offers(name: str, count: int, document_id: str = "") -> list[Offer]:
    """Blocks of two tokens of a request whose sequence is that of its name's first letter."""
    keys = [f"{name}{number}".encode() for number in range(count)]
    return [
        Offer(
            key, keys[number - 1] if number else b"", 2 * number, array("I", [7, 8]), (), document_id, 0, ord(name[0])
        )
        for number, key in enumerate(keys)
    ]  # fmt: skip


def test_runs_of_one_prompt_are_taken_together() -> None:
    backlog = Backlog()
    one, other = offers("a", 3), offers("b", 2)
    assert backlog.put([*one, *other]) == 0
    assert backlog.put(one[1:]) == 0, "queued already"
    assert backlog.take(2) == one[:2]
    assert backlog.busy == {b"a0", b"a1"}
    assert backlog.take(2) == one[2:]
    assert backlog.take(9) == other
    assert len(backlog) == 0
    assert not backlog.wait_empty(0.01), "the last ones are being written"
    backlog.done()
    assert backlog.wait_empty(0)


def test_a_block_of_two_documents_is_told_to_both() -> None:
    backlog = Backlog()
    backlog.put([*offers("a", 1, "one"), *offers("a", 1, "two"), *offers("a", 1, "one")])
    assert [offer.document_id for _ in range(2) for offer in backlog.take(1)] == ["one", "two"]
    assert len(backlog) == 0


def test_offers_can_be_dropped_by_request_and_by_key() -> None:
    backlog = Backlog()
    one, other = offers("a", 3), offers("b", 2)
    backlog.put([*one, *other])
    assert backlog.drop_request(one[0].sequence) == 3
    backlog.discard({b"b0"})
    assert backlog.take(9) == other[1:]
    backlog.put(one)
    assert backlog.take(9) == one, "what was dropped may come again"


def test_more_than_it_holds_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_TOKENS", 7)
    backlog = Backlog()
    assert backlog.put(offers("a", 5)) == 2
    assert len(backlog) == 3
    backlog.take(2)
    assert backlog.put(offers("b", 5)) == 3, "room for what was taken"
    backlog.drop_request(ord("b"))
    assert backlog.put(offers("c", 2)) == 0, "and for what was dropped"


def test_closing_ends_a_wait() -> None:
    backlog = Backlog()
    taken: list[list[Offer]] = []
    thread = threading.Thread(target=lambda: taken.append(backlog.take(1)))
    thread.start()
    backlog.close()
    thread.join(5)
    assert taken == [[]]
    backlog.put(offers("a", 1))
    assert backlog.take(1) == []
    assert backlog.wait_empty(0)
