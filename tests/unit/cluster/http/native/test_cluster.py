"""The route of the cluster's state."""

from __future__ import annotations

import asyncio

from tests.support.rigs.http import AnsweringService, direct_client


def test_the_cluster() -> None:
    async def run() -> None:
        with direct_client(AnsweringService()) as client:
            found = (await client.get("/v1/cluster")).json()
        assert (found["model"], found["queued"], found["address"]) == ("fake", 1, "127.0.0.1:8000")

    asyncio.run(run())
