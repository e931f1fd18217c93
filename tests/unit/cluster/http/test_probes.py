"""Health, readiness, version, metrics."""

from __future__ import annotations

import asyncio

from tests.support.rigs.http import AnsweringService, direct_client


def test_probes() -> None:
    async def run() -> None:
        service = AnsweringService()
        with direct_client(service) as client:
            for path in ("/health", "/ready"):
                assert (await client.get(path)).status_code == (await client.head(path)).status_code == 200
            assert (await client.get("/version")).json() == {"version": "1.2.3"}
            metrics = await client.get("/metrics")
            assert metrics.text == "longreach_jobs_total 1\n"
            assert metrics.headers["content-type"].startswith("text/plain; version=")
            for name, value in (("problem", "the store is locked"), ("is_draining", True)):
                setattr(service, name, value)
                answer = await client.get("/ready")
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
                assert "store" not in answer.text  # it is open to everybody
                assert (await client.get("/health")).status_code == 200
                service.problem, service.is_draining = "", False

    asyncio.run(run())
