"""Text of files of many formats on the side of the head."""

from __future__ import annotations

import tempfile

import pytest

from cluster.http.files import extraction
from cluster.http.files.extraction import file_text
from cluster.jobs.model import ServiceBusy
from protos.errors import InvalidRequest


def read(data: bytes, name: str = "a") -> bytes:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.seek(0)
        return file_text("file", file, name).data  # type: ignore[arg-type]


def test_text_stays_and_formats_become_text() -> None:
    assert read("ä".encode()) == read("ä".encode("utf-16")) == "ä".encode()
    assert b"# Title" in read(b"<html><body><h1>Title</h1></body></html>", "a.html")


def test_what_has_no_text_is_refused_with_its_name() -> None:
    with pytest.raises(InvalidRequest, match="file: b c: is a damaged PDF"):
        read(b"%PDF-1.7 nothing", "b\nc")


def test_few_files_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extraction, "_WAIT_S", 0.0)
    for _ in range(2):
        assert extraction._turns.acquire()
    try:
        assert read(b"a") == b"a"  # needs nobody else
        with pytest.raises(ServiceBusy, match="try again"):
            read(b"%PDF-1.7 x")
    finally:
        extraction._turns.release(2)
