"""The program of the process that takes the text out of a file of a format: a PDF or an archive may be hostile.

Its arguments are the format and the limits of memory (bytes) and processor time (seconds), standard input is the file.
It writes a line of JSON (`{"notes": [...]}` or `{"error": ...}`) and then the text as UTF-8.
"""

from __future__ import annotations

import json
import logging
import os
import warnings
import zipfile
from typing import Any, BinaryIO

from cluster.client.ingest.archives import open_zip, tar_tree, zip_tree
from cluster.client.ingest.limits import MAX_BYTES, Budget
from cluster.client.ingest.tree import tree_text
from cluster.common.child_limits import limit_resources
from cluster.common.text_format import one_line
from protos.errors import InvalidRequest

INSTALL = "pip install 'longreach[docs]'"
_OFFICE = {  # a member of the zip file: its format
    "word/document.xml": "docx", "ppt/presentation.xml": "pptx", "xl/workbook.xml": "xlsx",
    "META-INF/container.xml": "epub",
}  # fmt: skip
_NAMES = {"docx": "Word", "pptx": "PowerPoint", "xlsx": "Excel", "epub": "EPUB", "html": "HTML", "pdf": "PDF"}
_PASSWORD, _FORMAT = 4, 3  # error codes of PDFium
Text = tuple[str, tuple[str, ...]]  # and its notes


def main(kind: str, memory_bytes: int, cpu_seconds: int) -> None:
    """Write the text of standard input."""
    limit_resources(memory_bytes, 64, cpu_seconds)
    warnings.simplefilter("ignore")
    logging.disable()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no text
    header: dict[str, Any]
    content = b""
    try:
        with open(0, "rb", closefd=False) as file:
            text, notes = extract(kind, file)
        content = text.encode("utf-8", "replace")
        if len(content) > MAX_BYTES:
            raise InvalidRequest(f"has more than {MAX_BYTES >> 20} MiB of text")
        header = {"notes": notes}
    except InvalidRequest as error:
        header = {"error": str(error)}
    except MemoryError:
        header, content = {"error": f"needs more than {memory_bytes >> 20} MiB of memory"}, b""
    with out:
        out.write(json.dumps(header).encode() + b"\n" + content)


def extract(kind: str, file: BinaryIO) -> Text:
    """Return the text of a file and what a user should know about it.

    Args:
        kind: "pdf", "html", "tar" or "zip" (an archive, a document of Word, PowerPoint or Excel, or an EPUB).

    Raises:
        InvalidRequest: there is no text in it, it is damaged or encrypted, or a library is not installed.
    """
    if kind == "pdf":
        return pdf_text(file)
    if kind == "html":
        return markdown_text("html", file)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    budget = Budget(size)
    if kind == "tar":
        found = tree_text(tar_tree(file, budget), Budget(size))
        return found.text, found.notes()
    with open_zip(file) as archive:
        if office := office_kind(archive):
            file.seek(0)
            return markdown_text(office, file)
        found = tree_text(zip_tree(archive, budget), Budget(size))
        return found.text, found.notes()


def office_kind(archive: zipfile.ZipFile) -> str:
    """Return which document a zip file is, "" for an archive; raises InvalidRequest for what is not read."""
    names = set(archive.namelist())
    if "mimetype" in names and "content.xml" in names:
        raise InvalidRequest("is an OpenDocument file: save it as DOCX, PPTX or XLSX")
    unpacked = sum(info.file_size for info in archive.infolist())
    for member, kind in _OFFICE.items():
        if member in names and ("mimetype" if kind == "epub" else "[Content_Types].xml") in names:
            packed = sum(info.compress_size for info in archive.infolist())
            Budget(packed).check_unpacked(unpacked)
            return kind
    return ""


def pdf_text(file: BinaryIO) -> Text:
    """Return the text of a PDF in reading order, every page under a line such as `[Page 3 of 40]`."""
    try:
        import pypdfium2
    except ImportError as error:
        raise InvalidRequest(f"is a PDF: {INSTALL} brings what reads it") from error
    try:
        document = pypdfium2.PdfDocument(file)
        pages = [_page_text(document, number) for number in range(len(document))]
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == _PASSWORD or "password" in str(error).lower():
            raise InvalidRequest("is an encrypted PDF: save it without its password first") from error
        raise InvalidRequest(f"is a damaged PDF ({error})") from error
    total, empty = len(pages), sum(not page for page in pages)
    if empty == total:
        raise InvalidRequest(f"no text in {empty} of {total} pages: a scan needs OCR first; add the text of that")
    parts = [f"[Page {number} of {total}]\n{page}" for number, page in enumerate(pages, 1)]
    notes = [f"{total:,} page{'s' if total > 1 else ''}"]
    if empty:
        notes.append(f"no text in {empty} of {total} pages: pictures and scans are not read")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n", tuple(notes)


def _page_text(document: Any, number: int) -> str:
    page = document[number]
    try:
        text = page.get_textpage()
        try:
            found = str(text.get_text_range())
        finally:
            text.close()
    finally:
        page.close()
    # PDFium ends lines with CR LF and marks a hyphen at the end of one as U+FFFE
    lines = found.replace("\r\n", "\n").replace("\ufffe", "-").replace("\0", "").split("\n")
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def markdown_text(kind: str, file: BinaryIO) -> Text:
    """Return a document as Markdown, with headings and tables."""
    name = _NAMES[kind]
    try:
        from markitdown import StreamInfo, converters
    except ImportError as error:
        raise InvalidRequest(f"is a document of the format {name}: {INSTALL} brings what reads it") from error
    converter = getattr(converters, f"{kind.capitalize()}Converter")()
    try:
        # not markitdown's own choice of a converter, which guesses the format from the content
        result = converter.convert(file, StreamInfo(extension=f".{kind}"))
    except MemoryError:
        raise
    except Exception as error:
        reason = one_line(str(error) or type(error).__name__, 200)
        raise InvalidRequest(f"is a damaged or unusual {name} file ({reason})") from error
    text = str(result.markdown).replace("\r\n", "\n").strip("\n")
    if not text.strip():
        raise InvalidRequest(f"has no text (a file of the format {name})")
    return text + "\n", (f"converted from {name} to Markdown",)
