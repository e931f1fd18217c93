"""Every route and method: without a key, with a wrong one, and with that of another tenant.

A route needs a rule in `RULES`: who may call it, and what of a tenant it names. One without fails here.
"""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from cluster.access.call_pool import CallPool
from cluster.access.keys import ApiKeys
from cluster.config.schema import ServerSection
from cluster.http.app import make_app, make_routers, make_routes
from cluster.http.core.backend import Backend
from cluster.http.core.guard import OPEN
from cluster.http.responses.names import response_id
from cluster.http.responses.request import ResponsesRequest, response_spec
from cluster.jobs.model import JobInput, JobSpec
from cluster.jobs.tenants.service import TenantService
from cluster.jobs.tenants.tenant import Tenant
from protos.jobs.sampling import AnswerOptions
from tests.support.rigs.http import fake_runtime
from tests.support.rigs.service import Bench

ANN, BOB, OPS = "a" * 20, "b" * 20, "o" * 20
KEYS = {ANN: Tenant("ann"), BOB: Tenant("bob"), OPS: Tenant("ops", is_admin=True)}
MARK = "words of ann"  # in all that ann submits and uploads
UNKNOWN = "0123456789abcdef" * 2
Send = Callable[[str], dict[str, Any]]  # from the public id of an object, what httpx sends


@dataclass(frozen=True)
class Rule:
    """Who may call a route.

    Attributes:
        who: "open": no key is needed; "key": any key, and the answer has nothing of anybody; "admin"; "own": it makes
            or lists what is the caller's; "owner": it names an object, which must be the caller's.
        make: for "owner", makes an object, and returns its id as the route has it: in the path, or in what is sent.
        send: what is sent with it.
    """

    who: str
    make: Callable[[TenantService], str] | None = None
    send: Send = lambda name: {}


def chat(content: Any) -> Send:
    return lambda name: {"json": {"messages": [{"role": "user", "content": content}], "max_tokens": 2}}


RULES: dict[tuple[str, str], Rule] = {
    **{(method, path): Rule("open") for method in ("GET", "HEAD") for path in ("/health", "/ready")},
    **{("GET", path): Rule("key") for path in ("/version", "/v1/models", "/v1/models/{model:path}", "/openapi.json")},
    ("HEAD", "/openapi.json"): Rule("key"),
    ("POST", "/tokenize"): Rule("key", send=lambda name: {"json": {"prompt": "a"}}),
    ("POST", "/detokenize"): Rule("key", send=lambda name: {"json": {"tokens": [1]}}),
    ("GET", "/metrics"): Rule("admin"),
    ("POST", "/v1/chat/completions"): Rule("own", send=chat("a")),
    ("POST", "/v1/completions"): Rule("own", send=lambda name: {"json": {"prompt": "a", "max_tokens": 2}}),
    ("POST", "/v1/responses"): Rule("own", send=lambda name: {"json": {"input": "a", "max_output_tokens": 2}}),
    **{
        (method, f"/v1/responses/{{response_id}}{rest}"): Rule("owner", lambda service: respond(service))
        for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"))
    },
}


def submit(service: TenantService) -> str:
    spec = JobSpec(JobInput(prompt=MARK), AnswerOptions(max_tokens=2), labels={"mark": MARK})
    return service.submit(spec).id


def respond(service: TenantService, prompt: str = MARK) -> str:
    """The id of a response that has ended."""
    backend: Any = SimpleNamespace(runtime=fake_runtime(), limits=ServerSection(), model="needle")
    asked = ResponsesRequest.model_validate({"input": prompt, "background": True, "max_output_tokens": 2})
    record = service.wait(service.submit(response_spec(service, backend, asked)).id, 30.0)
    assert record.state.is_final
    return response_id(record.id)


def upload(service: TenantService) -> str:
    return service.add_document(MARK, [MARK.encode()], 1 << 20).id


def every_route() -> set[tuple[str, str]]:
    """Method and path of every route, as the application has them."""
    backend = Backend(None, fake_runtime(), ServerSection(), CallPool(9, "the limit"))  # type: ignore[arg-type]
    try:
        routes = [*make_routes(backend).routes, *(route for router in make_routers(backend) for route in router.routes)]
    finally:
        backend.close()
    return {
        (method, route.path)
        for route in routes
        if isinstance(route, Route | APIRoute)
        for method in route.methods or ()
    }


class Rig:
    """The application over a job service with keys, in which ann has something of everything."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.backend = Backend(bench.service, bench.runtime, ServerSection(), CallPool(64, "the limit"))
        self.app = make_app(self.backend, ApiKeys(KEYS))
        self.ids = [submit(self.of("ann")), upload(self.of("ann"))]

    def of(self, name: str) -> TenantService:
        return TenantService(self.bench.service, Tenant(name))

    def call(self, method: str, path: str, key: str, **sent: Any) -> httpx.Response:
        async def run() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, client=("127.0.0.1", 4711))
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
                return await client.request(method, path, headers=headers, **sent)

        return asyncio.run(run())

    def leaks(self, answer: httpx.Response, *known: str) -> bool:
        """Whether an answer has something of ann, but what the caller has said itself."""
        text = answer.text + json.dumps(dict(answer.headers))
        return MARK in text or any(one.partition("_")[2] in text for one in self.ids if one not in known)


@pytest.fixture
def rig(bench: Bench) -> Iterator[Rig]:
    made = Rig(bench)
    yield made
    made.backend.close()


def request_of(path: str, rule: Rule, name: str) -> tuple[str, dict[str, Any]]:
    """Return path and what is sent of a call about an object."""
    return re.sub(r"\{.*?\}", name, path), rule.send(name)


def test_every_route_has_a_rule() -> None:
    """A new one: say in RULES who may call it, and what it names."""
    assert every_route() - RULES.keys() == set()
    assert {key for key, rule in RULES.items() if rule.who == "open"} == OPEN


@pytest.mark.parametrize("key", ["", "wrong" * 4, ANN[:-1], f"ann:{ANN}"])
def test_without_a_valid_key_nothing_is_served(rig: Rig, key: str) -> None:
    refused = set()
    for (method, path), rule in RULES.items():
        name = rule.make(rig.of("ann")) if rule.make is not None else "x"
        target, sent = request_of(path, rule, name)
        answer = rig.call(method, target, key, **sent)
        if rule.who == "open":
            assert answer.status_code == 200, (method, path)
        else:
            assert answer.status_code == 401, (method, path)
            if method != "HEAD":
                refused.add(answer.text)
        assert not rig.leaks(answer), (method, path)
    assert len(refused) == 1


def test_another_key_gets_what_an_unknown_object_gives(rig: Rig) -> None:
    for (method, path), rule in RULES.items():
        if rule.make is None:
            target, sent = request_of(path, rule, "needle")
            answer = rig.call(method, target, BOB, **sent)
            assert (answer.status_code == 403) == (rule.who == "admin"), (method, path, answer.text)
            assert answer.status_code < 500, (method, path, answer.text)
            assert not rig.leaks(answer), (method, path)
            continue
        name = rule.make(rig.of("ann"))
        rig.ids.append(name)
        absent = re.sub(r"[0-9a-f]{32}", UNKNOWN, name)
        told = []
        for asked in (name, absent):
            target, sent = request_of(path, rule, asked)
            answer = rig.call(method, target, BOB, **sent)
            assert 400 <= answer.status_code < 500, (method, path, answer.text)
            assert not rig.leaks(answer, asked), (method, path)
            told.append((answer.status_code, answer.text.replace(asked, "ID")))
        assert told[0] == told[1], (method, path)
        target, sent = request_of(path, rule, name)
        assert rig.call(method, target, ANN, **sent).status_code < 400, (method, path)


def test_a_response_does_not_go_on_from_one_of_another_key(rig: Rig) -> None:
    name = respond(rig.of("ann"))
    told = []
    for asked in (name, f"resp_{UNKNOWN}"):
        body = {"input": "a", "max_output_tokens": 2, "previous_response_id": asked}
        answer = rig.call("POST", "/v1/responses", BOB, json=body)
        told.append((answer.status_code, answer.text.replace(asked, "ID")))
        assert not rig.leaks(answer, asked)
        stream = rig.call("GET", f"/v1/responses/{asked}?stream=true", BOB)
        assert (stream.status_code, MARK in stream.text) == (404, False)
    assert told[0] == told[1]
    assert rig.call("POST", "/v1/responses", ANN, json=body | {"previous_response_id": name}).status_code == 200


def test_an_admin_may_see_metrics(rig: Rig) -> None:
    assert rig.call("GET", "/metrics", OPS).status_code == 200
    said = rig.call("GET", "/metrics", BOB).json()["error"]
    assert (said["code"], said["message"]) == ("admin_only", "an admin key is needed for this")


def test_what_a_caller_makes_is_its_own(rig: Rig) -> None:
    for (method, path), rule in RULES.items():
        if rule.who == "own":
            before = {record.id for record in rig.of("bob").jobs([], {}, 100, "")[0]}
            target, sent = request_of(path, rule, "x")
            assert rig.call(method, target, BOB, **sent).status_code == 200, (method, path)
            made = {record.id for record in rig.of("bob").jobs([], {}, 100, "")[0]} - before
            assert made.isdisjoint(record.id for record in rig.of("ann").jobs([], {}, 100, "")[0])


def test_no_route_goes_around_the_tenants() -> None:
    """Only `core`, and what asks whether the head serves, may use the job service that knows no callers."""
    root = Path(make_app.__code__.co_filename).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "service" and ast.unparse(node.value).endswith("backend")
    }
    assert found <= {"core/calls.py", "core/following.py", "probes.py", "http_server.py"}
