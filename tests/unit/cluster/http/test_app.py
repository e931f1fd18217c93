"""Every route: what it needs a key for, what it answers without one, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from cluster.access.keys import ApiKeys
from cluster.http.app import make_routers, make_routes
from cluster.http.core.guard import OPEN
from tests.support.fakes.jobs_api import FakeJobService
from tests.support.rigs.http import AnsweringService, direct_client, make_backend

KEY = "0123456789abcdef"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


def all_paths() -> list[str]:
    backend = make_backend(FakeJobService())
    try:
        routes = [*make_routes(backend).routes, *(route for router in make_routers(backend) for route in router.routes)]
    finally:
        backend.close()
    return sorted({re.sub(r"\{.*?\}", "x", route.path) for route in routes if isinstance(route, Route | APIRoute)})


@pytest.mark.parametrize("headers", [
    {}, {"Authorization": "Bearer wrong-wrong-wrong-wrong"}, {"Authorization": f"Basic {KEY}"}, {"x-api-key": "wrong"},
    {"Authorization": f"Bearer {KEY}", "x-api-key": "another"}, {"Authorization": "Bearer "},
])  # fmt: skip
def test_nothing_is_served_without_a_key(headers: dict[str, str]) -> None:
    """Every route with every method, and one that is no route."""

    async def answers() -> dict[tuple[str, str], httpx.Response]:
        with direct_client(AnsweringService(), ApiKeys({KEY: "a"})) as client:
            found = {}
            for path in [*all_paths(), "/", "/nothing", "/health/", "//health", "/v1/../health"]:
                for method in METHODS:
                    found[method, path] = await client.request(method, path, headers=headers)
            return found

    found = asyncio.run(answers())
    assert {
        "/v1/chat/completions",
        "/metrics",
        "/openapi.json",
        "/tokenize",
        "/v1/files/x/content",
        "/v1/batches/x",
    } <= {path for _, path in found}
    served = [answer.request for answer in found.values() if answer.status_code != 401]
    assert {(request.method, request.url.path) for request in served} == OPEN  # as it was sent: `..` and `//` are gone
    refused = found["GET", "/v1/models"]
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert refused.headers["www-authenticate"] == "Bearer"
    assert {
        answer.json()["error"]["message"] for (m, _), answer in found.items() if m == "POST" and answer.content
    } == {refused.json()["error"]["message"]}


@pytest.mark.parametrize("headers", [{"Authorization": f"bearer {KEY}"}, {"x-api-key": KEY}])
def test_a_key_of_either_header_gives_access(headers: dict[str, str]) -> None:
    async def run() -> None:
        service = AnsweringService()
        with direct_client(service, ApiKeys({KEY: "team a"})) as client:
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
            body = {"messages": [{"role": "user", "content": "a"}]}
            assert (await client.post("/v1/chat/completions", json=body, headers=headers)).status_code == 200
        assert service.key_names == ["team a"]

    asyncio.run(run())


def test_without_keys_foreign_hosts_and_pages_are_refused() -> None:
    async def run() -> None:
        with direct_client(AnsweringService()) as client:
            for headers, status in (
                ({}, 200), ({"Host": "localhost:8000"}, 200), ({"Host": "[::1]:8000"}, 200),
                ({"Host": "evil.example:8000"}, 403), ({"Host": "["}, 403),
                ({"Origin": "http://127.0.0.1:8000"}, 200), ({"Origin": "http://evil.example"}, 403),
                ({"Origin": "null"}, 403), ({"Origin": "http://["}, 403), ({"Origin": "http://127.0.0.1:9000"}, 403),
                ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200), ({"Sec-Fetch-Site": "none"}, 200),
                ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),  # an image, a script
                ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors"}, 403),  # another port
                ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),  # a link
            ):  # fmt: skip
                answer = await client.get("/v1/models", headers=headers)
                assert answer.status_code == status, headers

    asyncio.run(run())


def test_unknown_routes_and_methods_have_error_objects() -> None:
    async def run() -> None:
        with direct_client(AnsweringService()) as client:
            unknown, wrong = await client.get("/nothing"), await client.post("/v1/models")
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
            assert wrong.headers["allow"] == "GET"

    asyncio.run(run())


def test_the_openapi_document_describes_the_bodies() -> None:
    async def run() -> None:
        with direct_client(AnsweringService()) as client:
            document = (await client.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        for path in (
            "/v1/chat/completions",
            "/v1/completions",
            "/tokenize",
            "/detokenize",
            "/v1/messages",
            "/v1/batches",
            "/v1/jobs",
        ):
            body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert body["$ref"].removeprefix("#/components/schemas/") in schemas
        shapes = {"/v1/jobs/{job_id}": "JobData", "/v1/documents": "DocumentPage", "/v1/cluster": "ClusterObject"}
        for path, name in shapes.items():
            shown = document["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
            assert shown["$ref"] == f"#/components/schemas/{name}"
        events = document["paths"]["/v1/jobs/{job_id}/events"]["get"]["responses"]
        assert "text/event-stream" in events["200"]["content"]
        assert "'422'" not in str(document)  # wrong parameters are a 400 like everything else
        assert not [path for path in document["paths"] if path == "/" or path.startswith("/page")]
        named = set(re.findall(r'"#/components/schemas/(\w+)"', str(document).replace("'", '"')))
        assert named <= set(schemas)

    asyncio.run(run())
