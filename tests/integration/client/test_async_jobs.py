"""Jobs of the asyncio client: waiting and streams that give up."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import cluster
from cluster import AsyncClient
from tests.integration.client.test_client import FAST, run_async
from tests.support.fakes.server import FakeHead


def test_async_stream_gives_up(head: FakeHead) -> None:
    async def body(client: AsyncClient) -> None:
        head.jobs.drops = [0] * 100
        job = await client.submit("text", "Why?")
        stream: AsyncIterator[Any] = job.stream(retries=FAST)
        with pytest.raises(cluster.Unavailable):
            async for _ in stream:
                pass

    run_async(head, body)


def test_async_wait_comes_back_in_time(head: FakeHead) -> None:
    async def body(client: AsyncClient) -> None:
        head.jobs.hold_after = 0
        job = await client.submit("text", "Why?")
        assert not (await job.wait(0.1)).done
        head.jobs.released.set()
        assert (await job.wait(10)).done

    run_async(head, body)
