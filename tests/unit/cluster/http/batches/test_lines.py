"""Lines of input files, good and bad, and lines of results."""

from __future__ import annotations

import json
import time
import tracemalloc
from itertools import islice

import pytest

from cluster.http.batches.lines import answered, not_answered, read_lines
from cluster.jobs.sqlite.batches import BatchLine
from tests.support.data.clients.batch_lines import chat

BATCH = "batch_" + "0" * 32
CHAT = "/v1/chat/completions"


def text(*lines: object, end: str = "") -> bytes:
    return ("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end).encode()


@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n"])
def test_lines_know_where_they_are(end: str) -> None:
    content = text(chat("é"), "", chat("b"), end=end)
    found = [*read_lines(content, CHAT, BATCH)]
    assert [(one.line, one.custom_id, one.status) for one in found] == [(1, "é", 0), (3, "b", 0)]
    for one in found:
        assert json.loads(content[one.start : one.start + one.size])["custom_id"] == one.custom_id


@pytest.mark.parametrize(("line", "custom_id", "param"), [
    ("{", None, None), ("[]", None, None), ("3", None, None), ({**chat("a"), "custom_id": 3}, None, "custom_id"),
    ({**chat("a"), "custom_id": ""}, None, "custom_id"), ({**chat("a"), "custom_id": "a" * 257}, None, "custom_id"),
    ({**chat("a"), "body": []}, None, "body"), ({"custom_id": "a"}, None, "method"),
    ({**chat("a"), "method": "GET"}, "a", "method"), ({**chat("a"), "url": "/v1/completions"}, "a", "url"),
    (chat("first"), "first", "custom_id"), ("\udc80".encode("utf-8", "surrogatepass").decode("latin-1"), None, None),
])  # fmt: skip
def test_a_bad_line_has_the_result_that_says_why(line: object, custom_id: str | None, param: str | None) -> None:
    good, bad, last = read_lines(text(chat("first"), line, chat("last")), CHAT, BATCH)
    assert (good.status, bad.status, last.status) == (0, 400, 0)
    result = json.loads(bad.result)
    assert result["custom_id"] == custom_id
    assert result["response"]["status_code"] == 400
    assert result["response"]["body"]["error"]["param"] == param


def test_lines_are_read_one_by_one() -> None:
    """A file of millions of short lines is given up at the first too many, and white space costs nothing."""
    content = b" \n" * (8 << 20) + b"{}\n" * (8 << 20)
    tracemalloc.start()
    began = time.process_time()
    found = [*islice(read_lines(content, CHAT, BATCH), 3)]
    assert time.process_time() - began < 2.0
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert [one.line for one in found] == [(8 << 20) + n for n in (1, 2, 3)]
    assert [one.size for one in found] == [2, 2, 2]
    assert [*read_lines(b" \n" * 9, CHAT, BATCH)] == []


def test_results() -> None:
    line = BatchLine(7, 0, 1, "a")
    assert json.loads(answered(BATCH, line, 200, "job_1", {"b": 1})) == {
        "id": f"batch_req_{'0' * 32}_7", "custom_id": "a", "error": None,
        "response": {"status_code": 200, "request_id": "job_1", "body": {"b": 1}},
    }  # fmt: skip
    late = json.loads(not_answered(BATCH, line, "batch_expired", "late"))
    assert (late["response"], late["error"]) == (None, {"code": "batch_expired", "message": "late"})
