"""Damaged requests: the same for the same seed, of every kind, and about every POST route."""

from __future__ import annotations

import random
import re
from collections import Counter

from cluster.bench.http.fuzz import schema_pieces
from cluster.bench.http.mutations import damage, places
from cluster.bench.http.recorded import RECORDED
from cluster.http.app import make_routes
from tests.support.rigs.http import AnsweringService, make_backend

OBJECTS = dict.fromkeys(("document", "file", "lines", "batch", "job", "response", "model"), "x")
KINDS = {
    "structure", "another value", "duplicate key", "truncated", "bad bytes", "content type", "flipped bytes", "chunked",
    "length",
}  # fmt: skip


def test_requests_are_damaged_in_every_way() -> None:
    found: Counter[str] = Counter()
    for number in range(600):
        recorded = RECORDED[number % len(RECORDED)].with_objects(OBJECTS)
        one, same = (damage(random.Random(number), recorded) for _ in range(2))
        assert one == same
        assert one.raw.startswith(f"POST {recorded.path} HTTP/1.1\r\n".encode())
        assert one.is_http or one.kind in ("chunked", "length")
        found[one.kind] += 1
    assert set(found) == KINDS


def test_places() -> None:
    assert places({"a": [1, {"b": None}]}) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]


def test_every_post_route_is_recorded() -> None:
    backend = make_backend(AnsweringService())
    paths = make_routes(backend).openapi()["paths"]
    backend.close()
    posted = {re.sub(r"\{.*?\}", "{}", path) for path, methods in paths.items() if "post" in methods}
    assert {re.sub(r"\{.*?\}", "{}", one.path.partition("?")[0]) for one in RECORDED} == posted


def test_cases_are_shared_by_the_operations() -> None:
    get = {"get": {}}
    document = {"paths": {"/a": get, "/b": {"post": {"requestBody": {}}}, "/c/{x}": {"get": {"parameters": [{}]}}}}
    assert list(schema_pieces(document, 8)) == [("get", "/a", 1), ("post", "/b", 4), ("get", "/c/{x}", 3)]
