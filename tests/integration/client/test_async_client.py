"""The asynchronous client against a service in memory over real gRPC."""

from __future__ import annotations

from pathlib import Path

import pytest

import cluster
from cluster import AsyncClient
from cluster.client.documents.pieces import PIECE_BYTES
from tests.integration.client.test_client import ANSWER, FAST, check_events, run_async
from tests.support.fakes.server import FakeHead


@pytest.mark.parametrize("drops", [[], [1], [3, 2, 3]])
def test_async_client(head: FakeHead, drops: list[int], tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    path.write_bytes(b"y" * (PIECE_BYTES + 1))

    async def body(client: AsyncClient) -> None:
        head.jobs.drops = list(drops)
        job = await client.submit("text", "Why?", max_tokens=3)
        check_events([event async for event in job.stream(retries=FAST)], 0)
        answers = await (await client.submit(path, ["Why?", "Who?"])).result()
        assert isinstance(answers, list)
        assert [answer.text for answer in answers] == [ANSWER] * 2
        assert head.jobs.pieces == [PIECE_BYTES, 1]
        head.jobs.store_then_fail = True
        once = await client.submit(prompt="p")
        assert len(head.jobs.jobs) == 3
        assert (await once.cancel()).state == "cancelled"
        await once.delete()
        assert [found.id async for found in client.jobs()] == [f"job_{1:032x}", f"job_{0:032x}"]
        assert [document.name for document in await client.documents.list()] == ["report.txt"]
        assert (await client.status()).kv_usage == 0.25
        with pytest.raises(cluster.NotFound):
            await client.job("job_unknown")

    run_async(head, body)
