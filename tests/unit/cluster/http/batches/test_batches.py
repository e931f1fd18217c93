"""The routes of batches: what is refused, what is shown, and to whom."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from cluster.access.keys import ApiKeys
from cluster.http.app import make_app
from cluster.http.batches.batches import batch_object
from cluster.jobs.sqlite.batches import BatchRecord, BatchStatus
from cluster.jobs.tenants.tenant import Tenant
from tests.support.data.clients.batch_lines import chat
from tests.unit.cluster.http.batches.conftest import TEAM, Batches

S = BatchStatus
KEYS = {"a" * 16: TEAM, "b" * 16: Tenant("team b")}
FILE = "file-" + "0" * 32
RECORD = BatchRecord("batch_1", "", S.IN_PROGRESS, "/v1/completions", "doc_2", "24h", 1.5, 9.5, {"k": "v"}, started=2.5)


def run(batches: Batches, work: Callable[[httpx.AsyncClient], Awaitable[Any]], key: str = "a" * 16) -> Any:
    async def inside() -> Any:
        transport = httpx.ASGITransport(make_app(batches.backend, ApiKeys(KEYS)))
        headers = {"Authorization": f"Bearer {key}"}
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
            return await work(client)

    return asyncio.run(inside())


def post(batches: Batches, path: str = "", key: str = "a" * 16, **body: Any) -> httpx.Response:
    answer: httpx.Response = run(batches, lambda client: client.post(f"/v1/batches{path}", json=body), key)
    return answer


def get(batches: Batches, path: str = "", key: str = "a" * 16, **query: object) -> httpx.Response:
    answer: httpx.Response = run(batches, lambda client: client.get(f"/v1/batches{path}", params=query), key)
    return answer


def begin(batches: Batches, **body: Any) -> httpx.Response:
    record = batches.bench.service.documents.put("in", [b"{}"], 100, purpose="batch", tenant=TEAM)
    asked = {"input_file_id": record.id.replace("doc_", "file-"), "endpoint": "/v1/completions", **body}
    return post(batches, **asked)


def test_a_new_batch(batches: Batches) -> None:
    made = begin(batches, completion_window="24h", metadata={"night": "1"}, output_expires_after={}).json()
    assert made["id"].startswith("batch_")
    assert (made["object"], made["status"], made["metadata"]) == ("batch", "validating", {"night": "1"})
    assert made["expires_at"] - made["created_at"] == 86400
    assert made["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert (made["errors"], made["output_file_id"], made["completed_at"]) == (None, None, None)
    assert get(batches, f"/{made['id']}").json() == made
    assert batches.backend.batches_changed.is_set()


@pytest.mark.parametrize(("fields", "status", "param"), [
    ({"input_file_id": FILE}, 404, None), ({"input_file_id": "../x"}, 400, "input_file_id"),
    ({"input_file_id": None}, 400, "input_file_id"), ({"endpoint": "/v1/embeddings"}, 400, "endpoint"),
    ({"completion_window": "0h"}, 400, "completion_window"), ({"completion_window": "31d"}, 400, "completion_window"),
    ({"completion_window": "soon"}, 400, "completion_window"), ({"metadata": {"a": 1}}, 400, "metadata.a"),
    ({"metadata": {str(n): "" for n in range(17)}}, 400, "metadata"),
    ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
])  # fmt: skip
def test_what_is_no_batch(batches: Batches, fields: dict[str, Any], status: int, param: str | None) -> None:
    refused = begin(batches, **fields)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param)
    assert get(batches).json()["data"] == []


def test_batches_of_another_key_are_not_there(batches: Batches) -> None:
    made, other = begin(batches).json()["id"], "b" * 16
    assert get(batches, f"/{made}", other).status_code == 404
    assert post(batches, f"/{made}/cancel", other).status_code == 404
    assert get(batches, key=other).json()["data"] == []
    assert get(batches, key=other, after=made).status_code == 404
    assert get(batches, "/batch_é").status_code == 404


def test_listing(batches: Batches) -> None:
    ids = [begin(batches).json()["id"] for _ in range(3)][::-1]
    page = get(batches, limit=2).json()
    assert ([one["id"] for one in page["data"]], page["has_more"], page["last_id"]) == (ids[:2], True, ids[1])
    assert [one["id"] for one in get(batches, after=ids[1]).json()["data"]] == ids[2:]
    for query in ({"limit": 0}, {"limit": 101}, {"limit": "x"}):
        assert get(batches, **query).json()["error"]["param"] == "limit"


def test_cancelling(batches: Batches) -> None:
    made = begin(batches).json()["id"]
    for _ in range(2):
        assert post(batches, f"/{made}/cancel").json()["status"] == "cancelling"
    done = batches.create([chat("a")])
    batches.runner.start()
    batches.reaches(done, S.COMPLETED)
    batches.reaches(made, S.CANCELLED)
    assert post(batches, f"/{made}/cancel").json()["status"] == "cancelled"
    refused = post(batches, f"/{done}/cancel")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")


def test_no_batch_is_begun_by_a_head_that_stops(batches: Batches) -> None:
    batches.bench.service.drain(0.0)
    assert begin(batches).status_code == 503


def test_what_is_shown() -> None:
    shown = batch_object(RECORD)
    assert (shown["in_progress_at"], shown["finalizing_at"], shown["input_file_id"]) == (2, None, "file-2")
    for status, field in ((S.COMPLETED, "completed_at"), (S.FAILED, "failed_at"), (S.EXPIRED, "expired_at"),
                          (S.CANCELLED, "cancelled_at")):  # fmt: skip
        ended = batch_object(replace(RECORD, status=status, finished=7.5, output="doc_3", problems=[{"code": "x"}]))
        times = {name: ended[name] for name in ("completed_at", "failed_at", "expired_at", "cancelled_at")}
        assert times == dict.fromkeys(times) | {field: 7}
        assert (ended["output_file_id"], ended["error_file_id"]) == ("file-3", None)
        assert ended["errors"] == {"object": "list", "data": [{"code": "x"}]}
