"""Calls of the service in threads."""

from __future__ import annotations

import asyncio
import threading

from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import make_backend


def test_blocking_calls_have_threads_of_their_own() -> None:
    async def run() -> None:
        backend = make_backend(FakeJobService())
        name = await backend.call(lambda suffix: threading.current_thread().name + suffix, "!")
        assert name.startswith("http_")
        assert name.endswith("!")
        assert backend.model == "needle"
        backend.close()
        backend.close()

    asyncio.run(run())
