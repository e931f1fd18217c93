"""The open calls of the servers: how many there may be, who gives way, and when a call that stalls is ended.

A call stalls while the head waits for its client: for the next piece of an upload, for the message of a request, or
for a reader that does not read. A stream that waits for its job does not.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from cluster.common.watched_thread import WatchedThread
from cluster.jobs.model import ServiceBusy
from cluster.jobs.tenants.tenant import Tenant

STALL_S = 30.0  # a call that stalls for so long is ended
PRESSED_STALL_S = 5.0  # and after this time already when its pool is full and another call wants in
REFUSED_S = 5.0  # for so long others leave room to a caller that was refused
_CHECK_EVERY_S = 0.5

_log = logging.getLogger(__name__)


class KeyRefused(Exception):
    """A call without a valid API key."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call: the name of its API key, else the host it comes from, and its connection.

    Attributes:
        peer: one connection, as gRPC writes it, such as ipv4:127.0.0.1:41234.
        tenant: whose jobs and documents it may see; None for a call without a key that needs none.
        key_id: of the key, see `access.keys`; empty without.
    """

    name: str
    peer: str
    tenant: Tenant | None = None
    key_id: str = ""

    def __str__(self) -> str:
        return f"{self.name} at {self.peer}"


class CallEnd(enum.Enum):
    """Why a call is ended by the server."""

    NO_ROOM = "no_room"  # others want its place
    NOT_READ = "not_read"
    NOT_SENT = "not_sent"
    REVOKED = "revoked"  # the key


EndCall = Callable[[CallEnd, str], None]  # the reason and its text; called from any thread


class OpenCall:
    """A call in a pool. Its owner says when it waits for the client; any thread may end it."""

    def __init__(self, caller: Caller, end: EndCall) -> None:
        self.caller = caller
        self._end = end
        self._active = time.monotonic()
        self._waits_to = ""  # what for, while it waits for the client
        self.is_ended = False  # by `end`; gRPC may show that to the call's thread as the end of its messages

    @contextlib.contextmanager
    def client(self, action: str) -> Iterator[None]:
        """Wait for the client inside the block, `action` being what it has to do: "send" or "read"."""
        self._active, self._waits_to = time.monotonic(), action
        try:
            yield
        finally:
            self._active, self._waits_to = time.monotonic(), ""

    def idle_s(self, now: float) -> float:
        """Return the seconds since the client last sent or took something."""
        return now - self._active

    def stalled_s(self, now: float) -> float:
        """Return the seconds for which the head has been waiting for the client, 0 when it does not wait."""
        return now - self._active if self._waits_to else 0.0

    def end_stalled(self, seconds: float) -> None:
        """End the call because its client does nothing; a reader may come back at once, at the token where it was."""
        reason, what = (CallEnd.NOT_READ, "read") if self._waits_to == "read" else (CallEnd.NOT_SENT, "sent")
        self.end(reason, f"the client has {what} nothing for {seconds:.0f} s: the call was ended, make it again")

    def end(self, reason: CallEnd, details: str) -> None:
        """End the call, whatever it waits for; its owner soon comes back."""
        self.is_ended = True
        self._end(reason, details)


class CallPool:
    """At most `size` calls at a time. When all are taken, those who have more than a fair share give way.

    The share of a caller is the size divided by the number of callers that have calls open; and within a caller, that
    of a connection is what the caller has divided by its connections.
    """

    def __init__(self, size: int, what: str, can_preempt: bool = True) -> None:
        """
        Args:
            what: the limit as errors name it.
            can_preempt: whether calls that do not stall may be ended to make room.
        """
        self._size = size
        self._what = what
        self._can_preempt = can_preempt
        self._lock = threading.Lock()
        self._calls: set[OpenCall] = set()
        self._refused: dict[str, float] = {}  # callers below their share that found no place, and when

    def __len__(self) -> int:
        return len(self._calls)

    @contextlib.contextmanager
    def open(self, caller: Caller, end: EndCall) -> Iterator[OpenCall]:
        """Hold a place inside the block. Raises ServiceBusy when none is free and nobody has to give way.

        Args:
            end: ends the call before its time.
        """
        call = OpenCall(caller, end)
        with self._lock:
            self._check_tenant(caller)
            gives_way = self._admit(caller)
            if gives_way is not None:
                self._calls.discard(gives_way)
            self._calls.add(call)
        try:
            if gives_way is not None:
                self._end(gives_way)
            yield call
        finally:
            with self._lock:
                self._calls.discard(call)

    def end_stalled(self) -> None:
        """End the calls that have stalled for `STALL_S`."""
        now = time.monotonic()
        with self._lock:
            stalled = [call for call in self._calls if call.stalled_s(now) >= STALL_S]
            self._calls.difference_update(stalled)
        for call in stalled:
            self._end(call)

    def end_where(self, is_over: Callable[[Caller], bool], reason: CallEnd, details: str) -> list[Caller]:
        """End the calls of some callers; returns these."""
        with self._lock:
            over = [call for call in self._calls if is_over(call.caller)]
            self._calls.difference_update(over)
        for call in over:
            call.end(reason, details)
        return [call.caller for call in over]

    def _check_tenant(self, caller: Caller) -> None:
        """Refuse one more call of a tenant that has as many as it may (ServiceBusy); short calls do not count."""
        most = caller.tenant.max_streams if caller.tenant is not None and self._can_preempt else None
        if most is not None and sum(call.caller.name == caller.name for call in self._calls) >= most:
            raise ServiceBusy(
                f"{most} calls of the {caller.name} are open: must be at most {most} (its limit streams): close one, "
                "or have the limit raised",
                1.0,
            )

    def _end(self, call: OpenCall) -> None:
        stalled = call.stalled_s(time.monotonic())
        if stalled >= PRESSED_STALL_S:
            _log.warning("a call of %s was ended: it stalled for %.0f s", call.caller, stalled)
            call.end_stalled(stalled)
        else:
            _log.warning("a call of %s was ended: others want its place", call.caller)
            call.end(CallEnd.NO_ROOM, f"ended to make room for others ({self._what}): {self._size}")

    def _admit(self, caller: Caller) -> OpenCall | None:
        """Return the call that makes room, None when there is room. Raises ServiceBusy."""
        now = time.monotonic()
        self._refused = {name: when for name, when in self._refused.items() if when > now - REFUSED_S}
        by_name = Counter(call.caller.name for call in self._calls)
        share = max(1, self._size // len(by_name.keys() | self._refused.keys() | {caller.name}))
        if len(self._calls) < self._size:
            if by_name[caller.name] < share or not self._refused.keys() - {caller.name}:
                self._refused.pop(caller.name, None)
                return None
            raise self._busy()  # what has become free is for those who were refused
        stalled = max(self._calls, key=lambda call: call.stalled_s(now))
        if stalled.stalled_s(now) >= PRESSED_STALL_S:
            return stalled
        candidates = self._above_share(caller, by_name, share) if self._can_preempt else []
        if candidates:
            return max(candidates, key=lambda call: call.idle_s(now))
        if by_name[caller.name] < share:
            self._refused[caller.name] = now
        raise self._busy()

    def _busy(self) -> ServiceBusy:
        return ServiceBusy(f"{self._size} calls are open, the limit ({self._what}): try again, or close one", 1.0)

    def _above_share(self, caller: Caller, by_name: Counter[str], share: int) -> Collection[OpenCall]:
        """Return the calls of who has more than a fair share, while the caller, or its connection, has less."""
        if by_name[caller.name] < share:
            name, most = by_name.most_common(1)[0]
            return [call for call in self._calls if call.caller.name == name] if most > share else []
        own = [call for call in self._calls if call.caller.name == caller.name]
        by_peer = Counter(call.caller.peer for call in own)
        share = max(1, len(own) // len(by_peer.keys() | {caller.peer}))
        peer, most = by_peer.most_common(1)[0]
        if by_peer[caller.peer] >= share or most <= share:
            return []
        return [call for call in own if call.caller.peer == peer]


class StallWatch:
    """A thread that ends stalled calls of some pools, from `start` to `close`."""

    def __init__(self, pools: Collection[CallPool]) -> None:
        self._pools = pools
        self._stop = threading.Event()
        self.thread = WatchedThread(self._run, "stalls", self._stop)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        self._stop.set()
        self.thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_CHECK_EVERY_S):
            for pool in self._pools:
                try:
                    pool.end_stalled()
                except Exception:  # noqa: BLE001 - the other pools, and the next round, must go on
                    _log.exception("stalled calls could not be ended")
