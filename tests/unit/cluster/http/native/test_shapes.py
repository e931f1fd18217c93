"""Our objects are those of the command line: each against the client's own reading of the messages."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter

from cluster.access import codec
from cluster.client.models import JobData, ProgressEvent, StreamCursor, TokenEvent
from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.http.native import shapes
from cluster.jobs.model import DocumentRecord
from cluster.jobs.subscriptions import ProgressUpdate
from protos.jobs import jobs_pb2 as pb
from tests.support.fakes.jobs_api import FakeJobService


def read(events: bytes) -> list[dict[str, Any]]:
    """The fields of each event, its data parsed."""
    found = []
    for block in events.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append(fields | {"data": json.loads(fields["data"])})
    return found


def test_tokens_are_those_of_the_command_line() -> None:
    tokens = [
        OutputToken(1, 0, 40, "hm", -0.5, (), "reasoning", "hm"),
        OutputToken(2, 1, 60, "a\nb\u2028", -0.25, ((60, -0.25), (7, -2.0)), "answer", "", "a\nb\u2028"),
    ]
    found = read(shapes.token_events(tokens))
    (message,) = codec.encode_tokens(tokens, True)
    theirs = [{"event": "token"} | asdict(event) for event in StreamCursor().events(message)]
    assert [one["data"] for one in found] == json.loads(json.dumps(theirs))
    assert all(isinstance(event, TokenEvent) for event in StreamCursor().events(message))
    assert [(one["id"], one["event"]) for one in found] == [("1", "token"), ("2", "token")]


def test_progress_is_that_of_the_command_line() -> None:
    update = ProgressUpdate(1, PrefillProgress(100, 10, 20, None))
    (found,) = read(shapes.progress_event(update))
    (theirs,) = StreamCursor().events(pb.JobEvent(number=3, progress=asdict(update)))
    assert isinstance(theirs, ProgressEvent)
    assert found["data"] == {"event": "progress"} | asdict(theirs)
    assert "id" not in found  # it says nothing about where to go on


def test_jobs_fit_the_schema_that_is_published() -> None:
    service = FakeJobService()
    record = service.finish(service.submit(_spec()).id)
    message = codec.encode_job(record, service.tokens(record.id), {})
    shown = shapes.job_object(message)
    assert TypeAdapter(JobData).validate_python(shown).id == record.id
    state, ended = read(shapes.job_event(message, False) + shapes.job_event(message, True))
    assert (state["event"], ended["event"]) == ("state", "ended")
    assert ended["data"] == {"event": "ended", "job": json.loads(json.dumps(shown))}


def _spec() -> Any:
    return codec.decode_submit(pb.SubmitRequest(prompt="a"), 0.0, lambda text: text)


def test_the_status_has_every_field_and_the_address() -> None:
    shown = shapes.cluster_object(FakeJobService().status(), "127.0.0.1:8000")
    assert (shown["model"], shown["kv_usage"], shown["address"]) == ("fake", 0.5, "127.0.0.1:8000")
    assert shown["stages"][0]["resident_bytes"] == 1 << 40
    assert TypeAdapter(shapes.ClusterObject).validate_python(shown).repairs == 0


def test_a_document() -> None:
    message = codec.encode_document(DocumentRecord("doc_1", "a", 3, 1.0, 2.0, seams=(1,)), 512, 4096)
    assert shapes.document_object(message)["stored_bytes"] == 4096
