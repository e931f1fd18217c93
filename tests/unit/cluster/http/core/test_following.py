"""A job of a request: its events, its keep-alive, and its end when the client goes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cluster.http.core import following
from cluster.http.core.backend import Backend
from cluster.http.core.following import ClientGone, EventStream, Followed, merge, while_connected
from cluster.http.core.sse import error_event
from cluster.jobs.model import JobInput, JobRecord, JobSpec, JobState
from protos.jobs.sampling import AnswerOptions
from tests.support.rigs.head import until
from tests.support.rigs.http import AnsweringService, make_backend

SPEC = JobSpec(JobInput(prompt="a"), AnswerOptions(), attached=True)


def begin(service: AnsweringService) -> tuple[Backend, Followed]:
    backend = make_backend(service)
    return backend, Followed(backend, service.submit(SPEC))


def test_events_come_until_the_job_has_ended() -> None:
    async def run() -> None:
        service = AnsweringService()
        backend, job = begin(service)
        found = [event async for event in job.events()]
        assert isinstance(found[-1], JobRecord)
        assert job.record.state is JobState.SUCCEEDED
        job.leave()
        until(service.closed.is_set)
        assert service.get(job.record.id).state is JobState.SUCCEEDED
        backend.close()

    asyncio.run(run())


def test_a_job_that_has_ended_is_followed_from_its_first_token() -> None:
    async def run() -> None:
        service = AnsweringService()
        backend = make_backend(service)
        job = Followed(backend, service.finish(service.submit(SPEC).id), ends_job=False)
        found = [event async for event in job.events()]
        assert [event for event in found if isinstance(event, list)] == service.events
        backend.close()

    asyncio.run(run())


def test_a_job_is_followed_before_anybody_asks_for_its_events() -> None:
    """One that nobody follows would be cancelled after a while: answers to several prompts are shown one by one."""

    async def run() -> None:
        service = AnsweringService()
        service.endless = True
        backend, job = begin(service)
        until(lambda: service.pulled == 1)
        job.leave()
        until(service.closed.is_set)
        backend.close()

    asyncio.run(run())


@pytest.mark.parametrize("taken", [0, 3])
def test_leaving_a_job_cancels_it(taken: int) -> None:
    async def run() -> None:
        service = AnsweringService()
        service.endless = True
        backend, job = begin(service)
        events = job.events()
        for _ in range(taken):
            await anext(events)
        job.leave()
        until(lambda: service.get(job.record.id).state is JobState.CANCELLED)
        until(service.closed.is_set)
        backend.close()

    asyncio.run(run())


def test_leaving_a_job_that_goes_on_without_its_client() -> None:
    async def run() -> None:
        service = AnsweringService()
        service.endless = True
        backend = make_backend(service)
        job = Followed(backend, service.submit(SPEC), ends_job=False)
        await anext(job.events())
        job.leave()
        until(service.closed.is_set)
        assert not service.get(job.record.id).state.is_final
        backend.close()

    asyncio.run(run())


def test_leaving_while_a_thread_waits_for_news() -> None:
    class Silent(AnsweringService):
        def _events(self, job_id: str, after: int) -> Any:
            try:
                while not self.get(job_id).state.is_final:
                    time.sleep(0.01)
                yield self.get(job_id)
            finally:
                self.closed.set()

    async def run() -> None:
        service = Silent()
        backend, job = begin(service)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(job.events())
        job.leave()
        until(service.closed.is_set)
        assert service.get(job.record.id).state is JobState.CANCELLED
        backend.close()

    asyncio.run(run())


def test_the_block_ends_when_the_client_goes() -> None:
    async def run() -> None:
        gone = asyncio.Event()

        async def receive() -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def follow() -> None:
            async with while_connected(receive):
                gone.set()
                await asyncio.sleep(10)

        with pytest.raises(ClientGone):
            await follow()
        gone.clear()
        async with while_connected(receive):
            pass
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()

    asyncio.run(run())


def test_a_stream_says_something_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now

    monkeypatch.setattr(following, "time", Clock)

    async def pieces() -> Any:
        nonlocal now
        for _ in range(11):
            now += 2.0
            yield b""
        yield b"data: 1\n\n"
        now += 2.0
        yield b""

    async def run() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            await asyncio.sleep(10)

        await EventStream(pieces(), error_event)({}, receive, send)  # type: ignore[arg-type]
        assert [message.get("body") for message in sent[1:]] == [
            b": keep-alive\n\n", b": keep-alive\n\n", b"data: 1\n\n", b"data: [DONE]\n\n",
        ]  # fmt: skip
        assert dict(sent[0]["headers"])[b"cache-control"] == b"no-cache"

    asyncio.run(run())


def test_several_streams_are_merged_as_they_come() -> None:
    async def run() -> None:
        gates = [asyncio.Event() for _ in range(3)]

        async def source(at: int) -> AsyncIterator[tuple[int, int]]:
            for turn in range(3):
                await gates[at].wait()
                gates[at].clear()
                yield at, turn

        found: list[tuple[int, int]] = []
        merged = merge([source(at) for at in range(3)])
        for at in (2, 0, 2, 2, 1, 0, 1, 0, 1):
            gates[at].set()
            found.append(await anext(merged))
        assert [at for at, _ in found] == [2, 0, 2, 2, 1, 0, 1, 0, 1]
        assert await anext(merged, None) is None
        assert [piece async for piece in merge([])] == []

    asyncio.run(run())


def test_the_first_error_ends_all_streams() -> None:
    ended: list[int] = []

    async def source(at: int) -> AsyncIterator[int]:
        try:
            while True:
                if at == 1:
                    raise ValueError("one failed")
                yield at
                await asyncio.sleep(10)
        finally:
            ended.append(at)

    async def run() -> None:
        with pytest.raises(ValueError, match="one failed"):
            async for _ in merge([source(at) for at in range(3)]):
                pass
        await asyncio.sleep(0)

    asyncio.run(run())
    assert sorted(ended) == [0, 1, 2]
