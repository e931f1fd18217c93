"""Some hundred requests that nobody should send; `python -m cluster.bench http-fuzz` sends thousands to a real head."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.bench.http.fuzz import Tally, read_document, schema_pieces, send_cases, send_mutations
from cluster.bench.http.rig import ask, cancel_all, make_objects, wait_until_idle
from tests.support.oracles.integrity import check_engine
from tests.support.rigs.http import HeadOverHttp

SEED = 1


@pytest.fixture
def served(tmp_path: Path) -> Iterator[HeadOverHttp]:
    made = HeadOverHttp(tmp_path, http_max_tokens=16, max_queued_jobs=4096)
    yield made
    made.close()


def check_idle(served: HeadOverHttp, expected: str) -> None:
    cancel_all(served.url)
    wait_until_idle(served.url, os.getpid(), 30)
    assert ask(served.url) == expected
    check_engine(served.runtime.engine)


def test_damaged_requests(served: HeadOverHttp) -> None:
    expected = ask(served.url)
    tally = send_mutations(served.url, make_objects(served.url), range(240), SEED)
    assert tally.problems == []
    assert tally.statuses["200"] > 30
    assert tally.statuses["400"] > 60
    check_idle(served, expected)


def test_requests_out_of_the_openapi_document(served: HeadOverHttp) -> None:
    expected, document, objects = ask(served.url), read_document(served.url), make_objects(served.url)
    tally = Tally()
    for method, path, count in schema_pieces(document, 120):
        tally.merge(send_cases(served.url, document, objects, method, path, count, SEED).as_row())
    assert tally.problems == []
    assert tally.count > 90
    assert {"positive", "negative"} == set(tally.kinds)
    check_idle(served, expected)
