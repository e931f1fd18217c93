"""The process that takes text out of foreign files ends within its limits, with one line."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from cluster.client.ingest import conversion
from cluster.client.ingest.conversion import ConversionLimits, convert
from protos.errors import InvalidRequest
from tests.support.documents.office import pdf, zipped


@pytest.fixture
def file() -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile() as opened:
        yield opened


def put(file: BinaryIO, data: bytes) -> BinaryIO:
    file.write(data)
    file.flush()
    return file


def test_text_and_notes_come_back(file: BinaryIO) -> None:
    assert convert("zip", put(file, zipped({"é": "ö"}))) == ("Files:\né\n\n==> é <==\nö\n".encode(), ("1 file",))


def test_its_errors_come_back(file: BinaryIO) -> None:
    with pytest.raises(InvalidRequest, match="is a damaged PDF"):
        convert("pdf", put(file, b"%PDF-1.4"))


def test_time_is_limited(file: BinaryIO) -> None:
    with pytest.raises(InvalidRequest, match=r"^takes more than 0.01 s to read"):
        convert("pdf", put(file, pdf(["a"])), ConversionLimits(seconds=0.01))


def test_memory_is_limited(file: BinaryIO) -> None:
    noise = os.urandom(24 << 20).hex()  # text that packs badly
    with pytest.raises(InvalidRequest, match=r"needs more than 96 MiB of memory|its reader ended"):
        convert("zip", put(file, zipped({"a": noise})), ConversionLimits(memory_bytes=96 << 20))


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"its reader ended \(SIGKILL\)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGXCPU)", "takes too much processor time"),
        ("raise OSError('odd')", r"its reader ended \(OSError: odd\)"),
        ("", r"its reader ended \(code 0\)"),
    ],
)
def test_a_reader_that_dies(monkeypatch: pytest.MonkeyPatch, file: BinaryIO, program: str, said: str) -> None:
    monkeypatch.setattr(conversion, "_PROGRAM", program)
    with pytest.raises(InvalidRequest, match=said):
        convert("pdf", file)


def test_nothing_of_the_folder_that_we_are_in_is_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: BinaryIO
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('hijacked')")
    monkeypatch.chdir(tmp_path)
    assert convert("zip", put(file, zipped({"a": "x"})))[1] == ("1 file",)
