"""The lines of a batch: requests in its input file, and results in its output files, each a JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import Field

from cluster.http.core.body import parse
from cluster.http.core.errors import ApiError, refuse
from cluster.http.options import RequestModel
from cluster.jobs.sqlite.batches import BatchLine
from protos.jobs.limits import MAX_CHARS
from protos.jobs.validate import show

MAX_LINES = 50_000  # of a batch
_BLANK = re.compile(rb"\s*+")


class RequestLine(RequestModel):
    """One request of a batch."""

    custom_id: str = Field(min_length=1, max_length=MAX_CHARS)
    method: str
    url: str
    body: dict[str, Any]


def read_lines(content: bytes, endpoint: str, batch_id: str) -> Iterator[BatchLine]:
    """Yield the lines of an input file; one that is no request of this batch has the result that says why.

    Args:
        content: is not copied: a file of short lines would become many times as large.
    """
    known: set[str] = set()
    at, number = 0, 1
    while (start := _end_of_blank(content, at)) < len(content):
        number += content.count(b"\n", at, start)
        at = content.find(b"\n", start)
        at = len(content) if at < 0 else at
        found = BatchLine(number, start, at - start, "")
        try:
            request = parse(RequestLine, content[start:at])
            found = replace(found, custom_id=request.custom_id)
            _check(request, endpoint, known)
            known.add(request.custom_id)
        except ApiError as error:
            shown = answered(batch_id, found, error.status, "", error.body)
            found = replace(found, status=error.status, result=shown)
        yield found


def _end_of_blank(content: bytes, at: int) -> int:
    """Return where white space ends."""
    match = _BLANK.match(content, at)
    assert match is not None
    return match.end()


def _check(request: RequestLine, endpoint: str, known: set[str]) -> None:
    if request.custom_id in known:
        raise refuse("custom_id", f"{show(request.custom_id)}: is another line's: must be unique")
    if request.method != "POST":
        raise refuse("method", f"{show(request.method)}: must be POST")
    if request.url != endpoint:
        raise refuse("url", f"{show(request.url)}: must be {endpoint}, the endpoint of the batch")


def answered(batch_id: str, line: BatchLine, status: int, request_id: str, body: Any) -> str:
    """Return the result of a line that a request was made of."""
    return _result(batch_id, line, {"status_code": status, "request_id": request_id, "body": body}, None)


def not_answered(batch_id: str, line: BatchLine, code: str, message: str) -> str:
    """Return the result of a line for which no request was made, or that was given up."""
    return _result(batch_id, line, None, {"code": code, "message": message})


def _result(batch_id: str, line: BatchLine, response: object, error: object) -> str:
    result = {
        "id": f"batch_req_{batch_id.removeprefix('batch_')}_{line.line}", "custom_id": line.custom_id or None,
        "response": response, "error": error,
    }  # fmt: skip
    return json.dumps(result, ensure_ascii=False)
