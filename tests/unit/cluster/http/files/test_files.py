"""Files over HTTP: they are documents, with another name."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.client.ingest import conversion
from tests.support.rigs.http import direct_client
from tests.support.rigs.service import Bench

UNKNOWN = f"file-{'0' * 32}"


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path, max_document_bytes=4096)
    yield made
    made.close()


def run(bench: Bench, work: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def inside() -> Any:
        with direct_client(bench.service, max_document_bytes=4096) as client:
            return await work(client)

    return asyncio.run(inside())


def upload(bench: Bench, data: bytes, name: str = "a.txt", purpose: str = "user_data") -> httpx.Response:
    answer: httpx.Response = run(
        bench, lambda client: client.post("/v1/files", files={"file": (name, data)}, data={"purpose": purpose})
    )
    return answer


def get(bench: Bench, path: str, **query: object) -> httpx.Response:
    answer: httpx.Response = run(bench, lambda client: client.get(f"/v1/files{path}", params=query))
    return answer


def test_a_file_is_a_document(bench: Bench) -> None:
    made = upload(bench, b"The code is 4711.", "report é.txt").json()
    digits = hashlib.sha256(b"The code is 4711.").hexdigest()[:32]
    record = bench.service.documents.get(f"doc_{digits}")
    assert made == {
        "id": f"file-{digits}", "object": "file", "bytes": 17, "created_at": int(record.created),
        "expires_at": int(record.expires), "filename": "report é.txt", "purpose": "user_data", "status": "processed",
        "status_details": None,
    }  # fmt: skip
    assert get(bench, f"/{made['id']}").json() == get(bench, f"/{record.id}").json() == made
    content = get(bench, f"/{made['id']}/content")
    assert (content.content, content.headers["content-type"]) == (b"The code is 4711.", "text/plain; charset=utf-8")
    deleted = run(bench, lambda client: client.delete(f"/v1/files/{made['id']}")).json()
    assert deleted == {"id": made["id"], "object": "file", "deleted": True}
    assert get(bench, f"/{made['id']}").status_code == 404
    assert get(bench, "").json() == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


def test_what_has_text_becomes_text(bench: Bench) -> None:
    page = b"<html><body><h1>Title</h1><p>Words</p></body></html>"
    made = upload(bench, page, "page.html").json()
    assert get(bench, f"/{made['id']}/content").text == "# Title\n\nWords\n"
    record = bench.service.documents.get(f"doc_{made['id'].removeprefix('file-')}")
    assert record.source_hash == hashlib.sha256(page).hexdigest()
    kept = upload(bench, page, "page.html", "batch").json()
    assert (get(bench, f"/{kept['id']}/content").content, kept["purpose"]) == (page, "batch")


@pytest.mark.parametrize(("data", "name", "purpose", "status", "said"), [
    (b"a", "a", "assistants", 400, "purpose: 'assistants': must be one of user_data, batch"),
    (b"", "a", "user_data", 400, "0 bytes"), (b"", "a", "batch", 400, "0 bytes"),
    (b"x" * 4097, "a", "user_data", 413, "max_document_bytes"), (b"x" * 4097, "a", "batch", 413, "max_document_bytes"),
    (b"x" * 90_000, "a", "batch", 413, "must be at most"), (b"\0\1" * 99, "a.bin", "user_data", 400, "is binary"),
    (b"%PDF-1.7 x", "a.pdf", "user_data", 400, "file: a.pdf: is a damaged PDF"),
])  # fmt: skip
def test_what_cannot_be_stored(bench: Bench, data: bytes, name: str, purpose: str, status: int, said: str) -> None:
    refused = upload(bench, data, name, purpose)
    assert refused.status_code == status
    assert said in refused.json()["error"]["message"]
    assert bench.service.documents.list() == []
    assert [path for path in (bench.folder / "documents").iterdir() if path.name.startswith(".upload")] == []


def test_a_pdf_without_what_reads_it_says_what_to_do(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = "import sys; sys.modules['pypdfium2'] = None\n"
    monkeypatch.setattr(conversion, "_PROGRAM", hidden + conversion._PROGRAM)
    refused = upload(bench, b"%PDF-1.7 x", "a.pdf").json()["error"]
    assert refused["message"].endswith("is a PDF: pip install 'longreach[docs]' brings what reads it")
    assert refused["param"] == "file"


def test_a_form_must_have_a_file(bench: Bench) -> None:
    form = {"purpose": (None, "user_data")}
    refused = run(bench, lambda client: client.post("/v1/files", files=form))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file")
    assert run(bench, lambda client: client.post("/v1/files", json={})).status_code == 400


def test_listing(bench: Bench) -> None:
    names = [upload(bench, f"{n}".encode(), f"{n}", ("user_data", "batch")[n % 2]).json()["filename"] for n in range(5)]
    page = get(bench, "", limit=2).json()
    assert [one["filename"] for one in page["data"]] == names[:2:-1]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (True, page["data"][0]["id"], page["data"][1]["id"])
    rest = get(bench, "", after=page["last_id"]).json()
    assert ([one["filename"] for one in rest["data"]], rest["has_more"]) == (names[2::-1], False)
    assert [one["filename"] for one in get(bench, "", order="asc").json()["data"]] == names
    assert [one["filename"] for one in get(bench, "", purpose="batch").json()["data"]] == ["3", "1"]
    assert [one["filename"] for one in get(bench, "", purpose="user_data").json()["data"]] == ["4", "2", "0"]
    for query, param in (({"limit": 0}, "limit"), ({"limit": "x"}, "limit"), ({"order": "up"}, "order"),
                         ({"purpose": "vision"}, "purpose")):  # fmt: skip
        refused = get(bench, "", **query)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
    assert get(bench, "", after=UNKNOWN).status_code == 404


def test_ids_that_are_none(bench: Bench) -> None:
    for path in (f"/{UNKNOWN}", "/..%2f..%2fetc", "/nothing", f"/{UNKNOWN}/content"):
        assert get(bench, path).status_code == 404


def test_damaged_content_is_not_served(bench: Bench) -> None:
    made = upload(bench, b"good").json()["id"]
    path = bench.service.documents.path(f"doc_{made.removeprefix('file-')}")
    path.write_bytes(b"evil")
    assert "other content" in get(bench, f"/{made}/content").json()["error"]["message"]
    path.unlink()
    assert get(bench, f"/{made}/content").status_code == 404
