"""Calls that all servers make: a whole job, lists, documents, and texts of refused submissions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.access import job_calls
from cluster.jobs.model import DocumentRecord, JobDamaged, ServiceBusy
from protos.errors import InvalidRequest
from protos.jobs import jobs_pb2 as pb
from tests.support.fakes.jobs_api import FakeJobService

SUBMIT = pb.SubmitRequest(document=pb.DocumentQuestions(text="A text.", questions=["Why?"]))


def served() -> Any:
    return FakeJobService()


def test_a_whole_job_has_its_tokens_and_while_it_runs_its_progress() -> None:
    service = served()
    record = job_calls.submit(service, SUBMIT, 100)
    running = job_calls.whole_job(service, record)
    assert (running.answers[0].progress.processed, list(running.answers[0].token_ids)) == (20, [])
    ended = job_calls.whole_job(service, service.finish(record.id))
    assert (ended.answers[0].text, list(ended.answers[0].token_ids)) == ("ab", [65, 66])
    assert not ended.answers[0].HasField("progress")


def test_a_job_with_damaged_tokens_is_shown_with_the_reason() -> None:
    service = served()
    record = service.finish(job_calls.submit(service, SUBMIT, 100).id)

    def tokens(*_: object) -> Any:
        raise JobDamaged("tokens: cannot be read")

    service.tokens = tokens
    assert job_calls.whole_job(service, record).error == "tokens: cannot be read"


def test_a_text_is_kept_only_with_its_job() -> None:
    service = served()
    ends: list[str] = []

    @contextlib.contextmanager
    def keep(text: str, max_bytes: int) -> Iterator[DocumentRecord]:
        try:
            yield service.upload("", [text.encode()])
        except ServiceBusy:
            ends.append("dropped")
            raise
        ends.append("kept")

    service.keep_text = keep
    job_calls.submit(service, SUBMIT, 100)
    service.error = ServiceBusy("full", 1.0)
    with pytest.raises(ServiceBusy):
        job_calls.submit(service, SUBMIT, 100)
    assert ends == ["kept", "dropped"]
    with pytest.raises(InvalidRequest, match="input"):
        job_calls.submit(service, pb.SubmitRequest(), 100)


def test_lists() -> None:
    service = served()
    ids = [job_calls.submit(service, SUBMIT, 100).id for _ in range(3)]
    page = job_calls.list_jobs(service, pb.ListRequest(page_size=2))
    assert ([job.id for job in page.jobs], page.next_page_token) == (ids[:2], ids[1])
    assert page.jobs[0].answers[0].progress.processed == 20
    (record,) = service.documents.list()
    service.stored_kv = lambda records: {record.id: (512, 4096)}
    (listed,) = job_calls.list_documents(service).documents
    assert listed == job_calls.show_document(service, record)
    assert (listed.stored_tokens, listed.stored_bytes) == (512, 4096)
