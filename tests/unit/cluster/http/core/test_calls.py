"""The place of a request, and its end before its time."""

from __future__ import annotations

import asyncio
import threading

import pytest

from cluster.access.call_pool import CallEnd, Caller
from cluster.http.core.calls import HttpCall
from cluster.jobs.model import ServiceBusy
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend


def test_a_place_is_held_changed_and_given_back() -> None:
    async def run() -> None:
        backend = make_backend(FakeJobService(), max_streams=1)
        ended = []
        call = HttpCall(backend, Caller("a", "a1"))
        with call.place():
            assert (len(backend.short), len(backend.streams)) == (1, 0)
            call.become_stream()
            call.at_end(lambda: ended.append(len(backend.streams)))
            assert (len(backend.short), len(backend.streams)) == (0, 1)
            other = HttpCall(backend, Caller("a", "a1"))
            with other.place(), pytest.raises(ServiceBusy, match=r"server\.max_streams"):
                other.become_stream()
            with call.waiting("read"):
                pass
        assert ended == [1]
        assert (len(backend.short), len(backend.streams)) == (0, 0)
        backend.close()

    asyncio.run(run())


@pytest.mark.parametrize(("reason", "status"), [
    (CallEnd.NO_ROOM, 429), (CallEnd.NOT_READ, 503), (CallEnd.NOT_SENT, 408),
])  # fmt: skip
def test_any_thread_may_end_it(reason: CallEnd, status: int) -> None:
    async def run() -> None:
        backend = make_backend(FakeJobService())
        call = HttpCall(backend, Caller("a", "a1"))
        with call.place():
            assert call._open is not None
            threading.Thread(target=call._open.end, args=(reason, "why")).start()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.sleep(10)
        assert call.ended is not None
        assert (call.ended.status, call.ended.message) == (status, "why")
        backend.close()

    asyncio.run(run())
