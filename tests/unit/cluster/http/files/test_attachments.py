"""Files in messages: by their ids or with their content, within bounds."""

from __future__ import annotations

import base64

import pytest

from cluster.http.core.errors import ApiError
from cluster.http.files import attachments
from cluster.http.files.attachments import Attachment, Attachments, document_id, file_id
from cluster.jobs.model import InvalidJob, JobNotFound
from protos.errors import InvalidRequest
from tests.support.fakes.jobs_api import FakeJobService

ID = "0123456789abcdef" * 2


@pytest.fixture
def service() -> FakeJobService:
    return FakeJobService()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_ids_of_files_are_those_of_documents() -> None:
    assert file_id(f"doc_{ID}") == f"file-{ID}"
    assert document_id(f"file-{ID}") == document_id(f"doc_{ID}") == f"doc_{ID}"


def test_what_can_be_attached(service: FakeJobService) -> None:
    record = service.add_document("stored", ["é".encode()], 100)
    assert Attachment("f", id=record.id).read(service.documents) == ("stored", "é")
    assert Attachment("f", "mine", id=file_id(record.id)).read(service.documents) == ("mine", "é")
    assert Attachment("f", text="a").read(service.documents) == ("document", "a")
    assert Attachment("f", "a.txt", data=encoded("ä".encode("latin-1"))).read(service.documents) == ("a.txt", "ä")
    assert Attachment("f", data=f"data:text/plain;base64,{encoded(b'x')}").read(service.documents) == ("document", "x")
    assert Attachments(service.documents).text(Attachment("f", "a\nb", text="c")) == "==> a\\nb <==\nc\n"


def test_what_cannot_be_attached(service: FakeJobService) -> None:
    for attachment, error in (
        (Attachment("f"), ApiError), (Attachment("f", data="a b"), ApiError), (Attachment("f", id="../x"), InvalidJob),
        (Attachment("f", id=f"file-{ID}"), JobNotFound), (Attachment("f", data=encoded(b"\0\1" * 99)), InvalidRequest),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            attachment.read(service.documents)
        assert error not in (ApiError, InvalidRequest) or str(caught.value).startswith("f: ")


def test_all_files_of_a_request_have_a_limit(service: FakeJobService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachments, "MAX_REQUEST_BYTES", 10)
    record = service.add_document("stored", [b"12345678"], 100)
    for second in (Attachment("g", text="1234"), Attachment("g", id=record.id)):
        reader = Attachments(service.documents)
        assert reader.text(Attachment("f", id=record.id))
        with pytest.raises(ApiError) as caught:
            reader.text(second)
        assert (caught.value.param, caught.value.code) == ("g", "context_length_exceeded")
