"""Our own routes over a socket: followers and readers that go, and uploads that are too long."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import httpx

from cluster.jobs.model import InvalidJob
from tests.support.rigs.head import until
from tests.support.rigs.http import AnsweringService, serving_http

BODY = {"document": "A text.", "questions": ["Why?"], "max_tokens": 9}
NO_DOC = f"doc_{'0' * 32}"


def test_who_stops_following_leaves_the_job_alone() -> None:
    service = AnsweringService()
    service.endless = True
    with serving_http(service) as url:
        job = httpx.post(f"{url}/v1/jobs", json=BODY).json()
        with httpx.stream("GET", f"{url}/v1/jobs/{job['id']}/events") as answer:
            assert next(answer.iter_lines()) == "id: 1"
        until(service.closed.is_set)
        assert httpx.get(f"{url}/v1/jobs/{job['id']}").json()["state"] == "queued"
        assert httpx.post(f"{url}/v1/jobs/{job['id']}/cancel").json()["state"] == "cancelled"


def test_an_upload_whose_length_nobody_declares_is_refused_as_soon_as_it_is_too_long() -> None:
    class Bounded(AnsweringService):
        taken = 0

        def add_document(self, name: str, pieces: Any, max_bytes: int, **_: Any) -> Any:
            for piece in pieces:
                self.taken += len(piece)
                if self.taken > max_bytes:
                    raise InvalidJob("document: too long")

    service = Bounded()

    def body() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"a" * 65536

    with serving_http(service, max_document_bytes=200_000) as url, contextlib.suppress(httpx.TransportError):
        # the head may close the connection while the client still sends
        answer = httpx.post(f"{url}/v1/documents", content=body(), timeout=30)
        assert answer.status_code == 400
    assert service.taken < 1 << 20


def test_an_archive_ends_when_nobody_reads_it() -> None:
    class Endless(AnsweringService):
        ended = threading.Event()

        def export_document(self, document_id: str, with_kv: bool) -> Iterator[bytes]:
            try:
                while True:
                    yield b"a" * 65536
            finally:
                self.ended.set()

    service = Endless()
    name = service.upload("", [b"A text."]).id
    with serving_http(service) as url:
        with httpx.stream("GET", f"{url}/v1/documents/{name}/export") as answer:
            assert answer.headers["content-type"] == "application/x-tar"
            assert next(answer.iter_bytes())
        until(service.ended.is_set)
        assert httpx.get(f"{url}/v1/documents/{NO_DOC}/export").status_code == 404
