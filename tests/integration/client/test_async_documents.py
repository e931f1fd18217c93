"""The documents of the asyncio client: the same calls, and an event loop that goes on meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

import cluster
from cluster import AsyncClient
from cluster.client.documents import async_documents
from tests.support.fakes.server import FakeHead


def test_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = FakeHead()
    path = tmp_path / "report.txt"
    path.write_text("a report")
    ticks = []

    def slow_read(*arguments: object) -> cluster.DocumentText:
        time.sleep(0.3)
        return cluster.read_source(*arguments)  # type: ignore[arg-type]

    async def tick() -> None:
        while True:
            ticks.append(time.monotonic())
            await asyncio.sleep(0.01)

    async def body() -> None:
        clock = asyncio.create_task(tick())
        async with AsyncClient(head.address) as client:
            monkeypatch.setattr(async_documents, "read_source", slow_read)
            document, job = await client.documents.add(path, read=True)
            assert (await job.wait(10)).done
            assert len(ticks) > 5, "files are read beside the event loop"
            monkeypatch.undo()
            longer = await client.documents.append(document.id, " and more")
            assert (await client.documents.pin(longer.id)).pinned
            assert not (await client.documents.unpin(longer.id)).pinned
            assert (await client.documents.count_tokens("abc")).tokens == 3
            head.jobs.export_drops = [0]
            await client.documents.export(longer.id, tmp_path / "out")
            await client.documents.delete(longer.id)
            assert (await client.documents.import_(tmp_path / "out")).id == longer.id
            assert {found.id for found in await client.documents.list()} == {document.id, longer.id}
            assert (await client.documents.get(document.id)).name == "report.txt"
            assert (await (await client.documents.read(document.id)).wait(10)).done
        clock.cancel()

    try:
        asyncio.run(asyncio.wait_for(body(), 30))
    finally:
        head.stop()
