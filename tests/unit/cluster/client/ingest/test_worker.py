"""Text of PDF, Office, EPUB and HTML files, and clear words about those that have none."""

from __future__ import annotations

import io
import sys
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.client.ingest.worker import extract
from protos.errors import InvalidRequest
from tests.support.documents.office import docx, epub, pdf, pptx, xlsx, zipped


def test_pdf_pages_are_marked() -> None:
    text, notes = extract("pdf", io.BytesIO(pdf(["What was decided", "", "By whom"])))
    assert text == "[Page 1 of 3]\nWhat was decided\n\n[Page 2 of 3]\n\n[Page 3 of 3]\nBy whom\n"
    assert notes == ("3 pages", "no text in 1 of 3 pages: pictures and scans are not read")


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("pdf", pdf(["", ""]), r"^no text in 2 of 2 pages: a scan needs OCR first"),
        ("pdf", pdf(["secret"], encrypted=True), "is an encrypted PDF: save it without its password first"),
        ("pdf", b"%PDF-1.7\nnothing else", "is a damaged PDF"),
        ("zip", zipped({"[Content_Types].xml": "x", "word/document.xml": "<no"}), "is a damaged or unusual Word file"),
        ("zip", zipped({"mimetype": "x", "content.xml": "<x/>"}), "is an OpenDocument file: save it as DOCX"),
        ("zip", zipped({}), "has no text file"),
        ("zip", b"PK\x03\x04 and no more", "is a damaged zip file"),
        ("html", b"<html></html>", "has no text"),
    ],
)
def test_what_has_no_text(kind: str, data: bytes, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        extract(kind, io.BytesIO(data))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "data", "lines"),
    [
        ("zip", docx("Terms", "We agreed."), ["# Terms", "We agreed."]),
        ("zip", xlsx([["name", "sum"], ["rent", 12.5]]), ["| name | sum |", "| rent | 12.5 |"]),
        ("zip", pptx("Plan", "First step"), ["# Plan", "First step"]),
        ("zip", epub(["<h1>One</h1><p>Once.</p>", "<h1>Two</h1>"]), ["# One", "Once.", "# Two"]),
        ("html", "<h1>Größe</h1><table><tr><th>a</th></tr><tr><td>1</td></tr></table>".encode(), ["# Größe", "| a |"]),
    ],
    ids=["docx", "xlsx", "pptx", "epub", "html"],
)
def test_formats_become_markdown(kind: str, data: bytes, lines: list[str]) -> None:
    text, notes = extract(kind, io.BytesIO(data))
    places = [text.splitlines().index(line) for line in lines]
    assert places == sorted(places)
    assert "to Markdown" in notes[0]
    assert extract(kind, io.BytesIO(data)) == (text, notes)


def test_archives_are_trees() -> None:
    text, notes = extract("zip", io.BytesIO(zipped({"a": "text"})))
    assert (text, notes) == ("Files:\na\n\n==> a <==\ntext\n", ("1 file",))


def test_office_bombs_are_not_unpacked() -> None:
    with pytest.raises(InvalidRequest, match="unpacks to more than 250 times its size"):
        extract("zip", io.BytesIO(zipped({"[Content_Types].xml": "x", "word/document.xml": b"a" * (17 << 20)})))


@pytest.mark.parametrize(
    ("kind", "data", "module"), [("pdf", pdf(["a"]), "pypdfium2"), ("zip", docx("a", "b"), "markitdown")]
)
def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch, kind: str, data: bytes, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InvalidRequest, match=r"pip install 'longreach\[docs\]' brings what reads it"):
        extract(kind, io.BytesIO(data))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 700), st.binary(min_size=1, max_size=8))
def test_a_damaged_pdf_is_one_error(at: int, noise: bytes) -> None:
    data = pdf(["some text", "other"])
    place = at % len(data)
    for broken in (data[:place] + noise + data[place + len(noise) :], data[:place]):
        try:
            text, _ = extract("pdf", io.BytesIO(broken))
        except InvalidRequest:
            continue
        assert text.startswith("[Page 1 of ")


def test_epubs_are_told_by_their_mimetype() -> None:
    data = epub(["<p>x</p>"])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != "mimetype"}
    text, _ = extract("zip", io.BytesIO(zipped(members)))
    assert text.startswith("Files:\n")
