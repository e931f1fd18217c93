"""Every route and method: without a key, with a wrong one, and with that of another tenant.

A route needs a rule in `RULES`: who may call it, and what of a tenant it names, in its path or in what is sent. One
without fails here.
"""

from __future__ import annotations

import ast
import asyncio
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
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
from cluster.http.files.attachments import file_id
from cluster.http.page import routes as page
from cluster.jobs.model import JobInput, JobSpec, new_id
from cluster.jobs.sqlite.batches import BatchRecord, BatchStatus
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
    """Who may call a route, in one way of calling it.

    Attributes:
        who: "open": no key is needed; "key": any key, and the answer has nothing of anybody; "admin"; "own": it makes
            or lists what is the caller's; "owner": it names an object, which must be the caller's.
        make: for "owner", makes an object, and returns its id as the route has it: in the path, or in what is sent.
        send: what is sent with it.
    """

    who: str
    make: Callable[[Rig], str] | None = None
    send: Send = lambda name: {}


class Rig:
    """The application over a job service with keys, in which ann has something of everything."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.backend = Backend(bench.service, bench.runtime, ServerSection(), CallPool(64, "the limit"))
        self.app = make_app(self.backend, ApiKeys(KEYS))
        self.ids = [job(self), document(self)]

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
        return MARK in text or any(digits(one) in text for one in self.ids if digits(one) not in map(digits, known))


def job(rig: Rig) -> str:
    """A job of ann that has ended."""
    spec = JobSpec(JobInput(prompt=MARK), AnswerOptions(max_tokens=2), labels={"mark": MARK})
    return rig.of("ann").wait(rig.of("ann").submit(spec).id, 20).id


def document(rig: Rig) -> str:
    return rig.of("ann").add_document(MARK, [MARK.encode()], 1 << 20).id


def text(rig: Rig) -> str:
    """A document of ann that nobody uses."""
    return rig.of("ann").add_document("", [f"{MARK}, once more".encode()], 1 << 20).id


def file(rig: Rig) -> str:
    return file_id(document(rig))


def batch(rig: Rig) -> str:
    ann, now = rig.of("ann"), rig.of("ann").now()
    made = BatchRecord(
        new_id("batch"), "ann", BatchStatus.VALIDATING, "/v1/completions", document(rig), "24h", now, now + 9.0,
        {"mark": MARK},
    )  # fmt: skip
    ann.batches.create(made)
    return made.id


def digits(name: str) -> str:
    """What follows the kind of an object in its id."""
    return re.split("[_-]", name)[-1]


def response(rig: Rig) -> str:
    """A stored response of ann that has ended."""
    body = {"input": MARK, "background": True, "max_output_tokens": 16}
    name: str = rig.call("POST", "/v1/responses", ANN, json=body).json()["id"]
    rig.of("ann").wait(f"job_{name.partition('_')[2]}", 20)
    return name


def ask(**more: Any) -> Send:
    """A request for a response; NAME in its values stands for an id."""
    text = json.dumps({"input": "a", "max_output_tokens": 16, **more})
    return lambda name: {"json": json.loads(text.replace("NAME", name))}


def chat(content: Any) -> Send:
    """A chat completion; NAME in its content stands for an id."""
    text = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 2})
    return lambda name: {"json": json.loads(text.replace("NAME", name))}


def message(content: Any) -> Send:
    """A message; NAME in its content stands for an id."""
    text = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 2})
    return lambda name: {"json": json.loads(text.replace("NAME", name))}


FILE = [{"type": "text", "text": "why?"}, {"type": "file", "file": {"file_id": "NAME"}}]
INPUT_PARTS = [{"type": "input_file", "file_id": "NAME"}, {"type": "input_text", "text": "why?"}]
FILE_BLOCK = [{"type": "document", "source": {"type": "file", "file_id": "NAME"}}]
FORM = {"files": {"file": ("a", b"words")}, "data": {"purpose": "batch"}}
RULES: dict[tuple[str, str], list[Rule]] = {
    **{(method, path): [Rule("open")] for method in ("GET", "HEAD") for path in ("/health", "/ready", *page.FILES)},
    **{("GET", path): [Rule("key")] for path in ("/version", "/v1/models", "/v1/models/{model:path}", "/openapi.json")},
    ("HEAD", "/openapi.json"): [Rule("key")],
    ("POST", "/tokenize"): [Rule("key", send=lambda name: {"json": {"prompt": "a"}})],
    ("POST", "/detokenize"): [Rule("key", send=lambda name: {"json": {"tokens": [1]}})],
    ("GET", "/metrics"): [Rule("admin")],
    ("POST", "/v1/chat/completions"): [Rule("own", send=chat("a")), Rule("owner", document, chat(FILE))],
    ("POST", "/v1/responses"): [
        Rule("own", send=ask()),
        Rule("own", send=ask(stream=True)),
        Rule("own", send=ask(background=True)),
        Rule("owner", response, ask(previous_response_id="NAME")),
        Rule("owner", file, ask(input=[{"role": "user", "content": INPUT_PARTS}])),
    ],
    ("GET", "/v1/responses/{response_id}"): [
        Rule("owner", response),
        Rule("owner", response, lambda name: {"params": {"stream": "true"}}),
    ],
    ("GET", "/v1/responses/{response_id}/input_items"): [Rule("owner", response)],
    ("POST", "/v1/responses/{response_id}/cancel"): [Rule("owner", response)],
    ("DELETE", "/v1/responses/{response_id}"): [Rule("owner", response)],
    ("POST", "/v1/completions"): [Rule("own", send=lambda name: {"json": {"prompt": "a", "max_tokens": 2}})],
    ("POST", "/v1/messages"): [Rule("own", send=message("a")), Rule("owner", file, message(FILE_BLOCK))],
    ("POST", "/v1/messages/count_tokens"): [Rule("own", send=message("a")), Rule("owner", file, message(FILE_BLOCK))],
    ("POST", "/v1/files"): [Rule("own", send=lambda name: FORM)],
    ("GET", "/v1/files"): [Rule("own"), Rule("owner", file, lambda name: {"params": {"after": name}})],
    **{("GET", f"/v1/files/{{file}}{rest}"): [Rule("owner", file)] for rest in ("", "/content")},
    ("DELETE", "/v1/files/{file}"): [Rule("owner", file)],
    ("POST", "/v1/batches"): [
        Rule("owner", file, lambda name: {"json": {"input_file_id": name, "endpoint": "/v1/completions"}})
    ],
    ("GET", "/v1/batches"): [Rule("own"), Rule("owner", batch, lambda name: {"params": {"after": name}})],
    ("GET", "/v1/batches/{batch}"): [Rule("owner", batch)],
    ("POST", "/v1/batches/{batch}/cancel"): [Rule("owner", batch)],
    ("POST", "/v1/jobs"): [
        Rule("own", send=lambda name: {"json": {"prompt": "a", "max_tokens": 2}}),
        Rule("owner", document, lambda name: {"json": {"document_id": name, "questions": ["a"], "max_tokens": 2}}),
    ],
    ("GET", "/v1/jobs"): [Rule("own")],
    **{("GET", f"/v1/jobs/{{job_id}}{rest}"): [Rule("owner", job)] for rest in ("", "/events")},
    ("POST", "/v1/jobs/{job_id}/cancel"): [Rule("owner", job)],
    ("DELETE", "/v1/jobs/{job_id}"): [Rule("owner", job)],
    ("POST", "/v1/documents"): [Rule("own", send=lambda name: {"content": b"words"})],
    ("GET", "/v1/documents"): [Rule("own")],
    **{("GET", f"/v1/documents/{{document_id}}{rest}"): [Rule("owner", document)] for rest in ("", "/export")},
    **{("POST", f"/v1/documents/{{document_id}}/{act}"): [Rule("owner", document)] for act in ("read", "pin")},
    ("POST", "/v1/documents/{document_id}/append"): [Rule("owner", document, lambda name: {"content": b"more"})],
    ("DELETE", "/v1/documents/{document_id}"): [Rule("owner", text)],
    ("POST", "/v1/documents/import"): [Rule("key", send=lambda name: {"content": b"no archive"})],
    ("GET", "/v1/cluster"): [Rule("key")],
}


EVERY = [(*route, rule) for route, rules in RULES.items() for rule in rules]


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
    assert {(method, path) for method, path, rule in EVERY if rule.who == "open"} == OPEN


@pytest.mark.parametrize("key", ["", "wrong" * 4, ANN[:-1], f"ann:{ANN}"])
def test_without_a_valid_key_nothing_is_served(rig: Rig, key: str) -> None:
    refused = set()
    for method, path, rule in EVERY:
        name = rule.make(rig) if rule.make is not None else "x"
        target, sent = request_of(path, rule, name)
        answer = rig.call(method, target, key, **sent)
        if rule.who == "open":
            assert answer.status_code == 200, (method, path)
        else:
            assert answer.status_code == 401, (method, path)
            if method != "HEAD":
                refused.add(answer.json()["error"]["message"])
        assert not rig.leaks(answer), (method, path)
    assert len(refused) == 1


def test_another_key_gets_what_an_unknown_object_gives(rig: Rig) -> None:
    for method, path, rule in EVERY:
        if rule.make is None:
            target, sent = request_of(path, rule, "needle")
            answer = rig.call(method, target, BOB, **sent)
            assert (answer.status_code == 403) == (rule.who == "admin"), (method, path, answer.text)
            assert answer.status_code < 500, (method, path, answer.text)
            assert not rig.leaks(answer), (method, path)
            continue
        name = rule.make(rig)
        rig.ids.append(name)
        absent = re.sub(r"[0-9a-f]{32}", UNKNOWN, name)
        told = []
        for asked in (name, absent):
            target, sent = request_of(path, rule, asked)
            answer = rig.call(method, target, BOB, **sent)
            assert 400 <= answer.status_code < 500, (method, path, answer.text)
            assert not rig.leaks(answer, asked), (method, path)
            told.append((answer.status_code, answer.text.replace(digits(asked), "ID")))
        assert told[0] == told[1], (method, path)
        target, sent = request_of(path, rule, name)
        assert rig.call(method, target, ANN, **sent).status_code < 400, (method, path)


def test_an_admin_may_see_metrics(rig: Rig) -> None:
    assert rig.call("GET", "/metrics", OPS).status_code == 200
    said = rig.call("GET", "/metrics", BOB).json()["error"]
    assert (said["code"], said["message"]) == ("admin_only", "an admin key is needed for this")


def test_what_a_caller_makes_is_its_own(rig: Rig) -> None:
    for method, path, rule in EVERY:
        if rule.who == "own":
            before = {record.id for record in rig.of("bob").jobs([], {}, 100, "")[0]}
            target, sent = request_of(path, rule, "x")
            assert rig.call(method, target, BOB, **sent).status_code == 200, (method, path)
            made = {record.id for record in rig.of("bob").jobs([], {}, 100, "")[0]} - before
            assert made.isdisjoint(record.id for record in rig.of("ann").jobs([], {}, 100, "")[0])


def test_an_archive_becomes_a_document_of_whoever_imports_it(rig: Rig) -> None:
    name = document(rig)
    archive = rig.call("GET", f"/v1/documents/{name}/export", ANN).content
    assert rig.call("GET", f"/v1/documents/{name}/export", BOB).status_code == 404
    made = rig.call("POST", "/v1/documents/import", BOB, content=archive).json()
    assert (made["name"], made["size_bytes"], made["shared"]) == (MARK, len(MARK), False)
    assert made["id"] != name
    listed = rig.call("GET", "/v1/documents", BOB).json()["documents"]
    assert [one["id"] for one in listed] == [made["id"]]
    assert rig.call("GET", f"/v1/documents/{made['id']}", ANN).status_code == 404
    assert rig.call("DELETE", f"/v1/documents/{made['id']}", BOB).status_code == 200
    assert rig.call("GET", f"/v1/documents/{name}/export", ANN).content == archive
    with_parent = rig.call("POST", f"/v1/documents/{name}/append", ANN, content=b" and more").json()
    archive = rig.call("GET", f"/v1/documents/{with_parent['id']}/export", ANN).content
    made = rig.call("POST", "/v1/documents/import", BOB, content=archive).json()
    assert made["id"] != with_parent["id"]
    assert digits(name) not in str(made)
    assert rig.call("GET", f"/v1/documents/{made['parent']}", BOB).status_code == 404


def test_an_import_keeps_the_limit_of_its_key(rig: Rig) -> None:
    rig.app = make_app(rig.backend, ApiKeys({**KEYS, BOB: Tenant("bob", max_document_bytes=8192)}))
    name = rig.of("ann").add_document("", [MARK.encode() * 2000], 1 << 20).id
    archive = rig.call("GET", f"/v1/documents/{name}/export", ANN).content
    answer = rig.call("POST", "/v1/documents/import", BOB, content=archive)
    assert answer.status_code == 429
    assert "its limit document-bytes" in answer.json()["error"]["message"]
    assert rig.call("GET", "/v1/documents", BOB).json()["documents"] == []


def test_a_form_keeps_the_limit_of_its_key_while_it_comes(rig: Rig) -> None:
    rig.app = make_app(rig.backend, ApiKeys({**KEYS, BOB: Tenant("bob", max_document_bytes=8192)}))
    sizes: list[int] = []
    spool = rig.bench.service.documents.spool

    class Counted:
        def __init__(self) -> None:
            self._file = spool()

        def write(self, data: bytes) -> int:
            sizes.append(len(data))
            return self._file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    rig.bench.service.documents.spool = Counted  # type: ignore[assignment, method-assign]
    for purpose in ("batch", "user_data"):
        form = {"files": {"file": ("a", b"words " * 200_000)}, "data": {"purpose": purpose}}
        answer = rig.call("POST", "/v1/files", BOB, **form)
        assert answer.status_code == 429, answer.text
        assert "its limit document-bytes" in answer.json()["error"]["message"]
        assert sum(sizes) <= 8192
    small = {"files": {"file": ("a", b"words " * 100)}, "data": {"purpose": "batch"}}
    assert rig.call("POST", "/v1/files", BOB, **small).status_code == 200
    assert not rig.bench.service.documents._uploading


def test_no_route_goes_around_the_tenants() -> None:
    """Only `core`, and what asks whether the head serves, may use the job service that knows no callers; batches are
    worked on as their owners.
    """
    root = Path(make_app.__code__.co_filename).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "service" and ast.unparse(node.value).endswith("backend")
    }
    assert found <= {"core/calls.py", "core/following.py", "http_server.py", "probes.py"}
