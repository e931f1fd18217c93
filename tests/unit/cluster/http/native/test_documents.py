"""Routes of documents: add, append, list, read, pin, delete, and archives."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest

from cluster.http.native.documents import Archive
from cluster.jobs.model import JobNotFound
from tests.support.rigs.http import AnsweringService, direct_client, make_backend

NO_DOC = f"doc_{'0' * 32}"


def using(service: AnsweringService, act: Callable[[httpx.AsyncClient], Awaitable[Any]], **limits: object) -> Any:
    async def run() -> Any:
        with direct_client(service, **limits) as client:
            return await act(client)

    return asyncio.run(run())


def described(service: AnsweringService) -> AnsweringService:
    service.stored_kv = lambda records: {record.id: (512, 4096) for record in records}  # type: ignore[method-assign]
    return service


def test_a_document_from_its_upload_to_its_end() -> None:
    service = described(AnsweringService())

    async def act(client: httpx.AsyncClient) -> None:
        params = {"name": "report", "max_tokens": 4000, "pinned": "true", "source_hash": "0" * 64, "shared": "true"}
        added = (await client.post("/v1/documents", content=b"A text.", params=params)).json()
        assert service.contents[added["id"]] == b"A text."
        assert (added["name"], added["scale_len"], added["pinned"], added["source_hash"]) == (
            "report", 4000, True, "0" * 64,
        )  # fmt: skip
        assert (added["stored_tokens"], added["stored_bytes"], added["shared"]) == (512, 4096, True)
        url = f"/v1/documents/{added['id']}"
        longer = (await client.post(f"{url}/append", content=b" More.", params={"name": "longer"})).json()
        assert (service.contents[longer["id"]], longer["parent"]) == (b"A text. More.", added["id"])
        listed = (await client.get("/v1/documents")).json()["documents"]
        assert listed == [added, longer]
        assert (await client.get(url)).json() == added
        assert not (await client.post(f"{url}/pin", json={"pinned": False})).json()["pinned"]
        assert (await client.post(f"{url}/pin")).json()["pinned"]
        job = (await client.post(f"{url}/read")).json()
        assert (job["read"], job["document_id"], service.specs[-1].input.read) == (True, added["id"], True)
        assert (await client.get(f"{url}/export", params={"without_kv": 1})).content == b"A text."
        assert (await client.delete(url)).json() == {"id": added["id"], "deleted": True}
        back = (await client.post("/v1/documents/import", content=b"A text.")).json()
        assert (back["id"], back["name"]) == (added["id"], "imported")

    using(service, act)


def test_what_is_refused() -> None:
    async def act(client: httpx.AsyncClient) -> None:
        for method, path in (
            ("GET", ""), ("POST", "/pin"), ("POST", "/append"), ("DELETE", ""), ("GET", "/export"),
        ):  # fmt: skip
            missing = await client.request(method, f"/v1/documents/{NO_DOC}{path}")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found"), path
            assert (await client.request(method, f"/v1/documents/x{path}")).status_code == 400, path
        url = "/v1/documents"
        form = await client.post(url, files={"file": b"a"})
        assert (form.status_code, "--data-binary" in form.text) == (415, True)
        assert (await client.post(url, content=b"a" * 21)).status_code == 413
        for params, name in (
            ({"name": "n" * 300}, "name"), ({"max_tokens": -1}, "max_tokens"), ({"pinned": "perhaps"}, "pinned"),
            ({"source_hash": "0"}, "source_hash"),
        ):  # fmt: skip
            refused = await client.post(url, content=b"a", params=params)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)
        wrong = await client.post(f"{url}/{NO_DOC}/pin", json={"pin": True})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "pin")

    using(described(AnsweringService()), act, max_document_bytes=20)


def test_an_archive_that_breaks_is_no_whole_one() -> None:
    class Broken(AnsweringService):
        def export_document(self, document_id: str, with_kv: bool) -> Iterator[bytes]:
            yield b"a"
            raise JobNotFound("it was deleted meanwhile")

    async def run() -> None:
        service: Any = Broken()
        backend = make_backend(service)
        archive = Archive(backend, service, NO_DOC, True)
        await archive.begin()
        with pytest.raises(JobNotFound):
            assert [piece async for piece in archive.pieces()]
        backend.close()

    asyncio.run(run())
