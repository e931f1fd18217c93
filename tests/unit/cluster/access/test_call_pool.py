"""Who gets a place in a pool of calls and who gives way; over real connections it is in tests/integration."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest

from cluster.access import call_pool
from cluster.access.call_pool import PRESSED_STALL_S, REFUSED_S, STALL_S, CallEnd, Caller, CallPool, OpenCall
from cluster.jobs.model import ServiceBusy
from cluster.jobs.tenants.tenant import Tenant


class Rig:
    """A pool of a few calls at a time of our choosing."""

    def __init__(self, size: int, can_preempt: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(call_pool.time, "monotonic", lambda: self.now)
        self.pool = CallPool(size, "the limit", can_preempt)
        self.ended: list[tuple[str, CallEnd]] = []
        self.details: list[str] = []
        self._stack = contextlib.ExitStack()

    def _end(self, caller: Caller, reason: CallEnd, details: str) -> None:
        self.ended.append((str(caller), reason))
        self.details.append(details)

    def open(self, name: str, peer: str = "", stack: contextlib.ExitStack | None = None) -> OpenCall:
        caller = Caller(name, peer or name)
        return (stack or self._stack).enter_context(self.pool.open(caller, partial(self._end, caller)))

    def refuse_then_free(self, name: str) -> None:
        """Let "a" have all four places, so that another is refused, and then give one back."""
        first = contextlib.ExitStack()
        self.open("a", stack=first)
        for _ in range(3):
            self.open("a")
        assert self.refused(name)
        first.close()

    def refused(self, name: str, peer: str = "") -> bool:
        try:
            with contextlib.ExitStack() as stack:
                self.open(name, peer, stack)
        except ServiceBusy:
            return True
        return False


@pytest.fixture
def rig(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(*getattr(request, "param", (4, True)), monkeypatch=monkeypatch)  # type: ignore[misc]


def test_one_caller_may_have_everything_and_no_more(rig: Rig) -> None:
    for _ in range(4):
        rig.open("a")
    assert rig.refused("a")
    assert not rig.ended
    assert len(rig.pool) == 4


def test_the_idlest_call_of_who_has_most_gives_way(rig: Rig) -> None:
    calls = [rig.open("a", f"a{number}") for number in range(4)]
    for call in (calls[0], calls[1], calls[3]):
        rig.now += 1
        with call.client("read"):
            pass
    rig.open("b")
    assert rig.ended == [("a at a2", CallEnd.NO_ROOM)]
    rig.open("b")
    assert [who for who, _ in rig.ended] == ["a at a2", "a at a0"]
    assert rig.refused("b")  # each has half
    rig.open("c")  # a share is one call now
    assert rig.refused("c")
    assert len(rig.pool) == 4


def test_a_share_is_at_least_one(rig: Rig) -> None:
    for name in "abcd":
        rig.open(name)
    assert rig.refused("e")
    assert not rig.ended


def test_connections_of_one_caller_share_too(rig: Rig) -> None:
    for _ in range(4):
        rig.open("host", "one")
    rig.open("host", "two")
    rig.open("host", "two")
    assert [who for who, _ in rig.ended] == ["host at one"] * 2
    assert rig.refused("host", "two")
    rig.open("host", "three")
    assert rig.refused("host", "three")


@pytest.mark.parametrize("action", ["send", "read"])
def test_a_stalled_call_makes_room_for_anybody(rig: Rig, action: str) -> None:
    calls = [rig.open("a") for _ in range(4)]
    with calls[2].client(action):
        rig.now += PRESSED_STALL_S - 1
        assert rig.refused("a")
        rig.now += 1
        assert not rig.refused("a")
    code = CallEnd.NOT_SENT if action == "send" else CallEnd.NOT_READ
    assert rig.ended == [("a at a", code)]
    assert "for 5 s" in rig.details[0]


def test_stalled_calls_are_ended_after_a_while(rig: Rig) -> None:
    waiting, sending, reading = (rig.open(name) for name in "abc")
    with sending.client("send"), reading.client("read"):
        rig.now += STALL_S - 1
        rig.pool.end_stalled()
        assert not rig.ended
        rig.now += 1
        rig.pool.end_stalled()
    rig.now += 10 * STALL_S
    rig.pool.end_stalled()
    assert sorted(rig.ended) == [("b at b", CallEnd.NOT_SENT), ("c at c", CallEnd.NOT_READ)]
    assert rig.pool._calls == {waiting}


@pytest.mark.parametrize("rig", [(4, False)], indirect=True)
def test_without_preemption_what_becomes_free_is_for_the_one_who_was_refused(rig: Rig) -> None:
    rig.refuse_then_free("b")
    assert rig.refused("a")  # it has three, and a share is two
    rig.open("b")
    assert rig.refused("b")
    assert not rig.ended


@pytest.mark.parametrize("rig", [(4, False)], indirect=True)
def test_who_does_not_come_again_is_forgotten(rig: Rig) -> None:
    rig.refuse_then_free("b")
    rig.now += REFUSED_S
    rig.open("a")
    assert not rig.pool._refused


def test_places_come_back(rig: Rig) -> None:
    for _ in range(3):
        with contextlib.ExitStack() as stack, contextlib.suppress(KeyError):
            for name in "abcd":
                rig.open(name, stack=stack)
            raise KeyError
        assert len(rig.pool) == 0


def test_a_tenant_has_its_own_limit_of_streams() -> None:
    limited = Caller("key law", "p", Tenant("law", max_streams=2))
    other = Caller("key ops", "p", Tenant("ops"))
    for can_preempt in (True, False):
        pool = CallPool(9, "the limit", can_preempt)
        with contextlib.ExitStack() as stack:
            for caller in (limited, limited, other):
                stack.enter_context(pool.open(caller, lambda *_: None))
            if can_preempt:
                with pytest.raises(ServiceBusy, match=r"^2 calls of the key law are open: must be at most 2"):
                    stack.enter_context(pool.open(limited, lambda *_: None))
            else:
                stack.enter_context(pool.open(limited, lambda *_: None))
            stack.enter_context(pool.open(other, lambda *_: None))


def test_calls_of_some_callers_are_ended(rig: Rig) -> None:
    for name in "aab":
        rig.open(name)
    ended = rig.pool.end_where(lambda caller: caller.name == "a", CallEnd.REVOKED, "why")
    assert [caller.name for caller in ended] == ["a", "a"]
    assert rig.ended == [("a at a", CallEnd.REVOKED)] * 2
    assert len(rig.pool) == 1
