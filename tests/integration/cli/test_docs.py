"""`longreach docs` and `longreach tokens` as a user runs them, against a service in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protos.jobs import jobs_pb2 as pb
from tests.integration.conftest import CommandLine
from tests.support.documents.office import pdf
from tests.support.fakes.documents import MAX_MODEL_LEN
from tests.support.fakes.server import WORDS, FakeHead
from tests.support.paths import ROOT

UNKNOWN = "doc_" + "f" * 32


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "a.py").write_text("import os\n")
    (folder / "logo.png").write_bytes(b"\x89PNG\0")
    return folder


def test_a_document_from_first_to_last(verb: CommandLine, head: FakeHead, project: Path, tmp_path: Path) -> None:
    done = verb("docs", "add", project, "--pin", "--share", "--max-tokens", "4k", "--read")
    added = done.out.strip()
    assert (done.code, head.jobs.files[added].scale_len, head.jobs.files[added].pinned) == (0, 4000, True)
    assert head.jobs.files[added].shared
    said, reading = done.err.splitlines()
    assert said == "project: 1 file; left out: 1 binary file"
    assert reading.startswith("reading it: longreach wait job_")
    (tmp_path / "more.txt").write_text("more\n")
    longer = verb("docs", "append", added, tmp_path / "more.txt").out.strip()
    assert head.jobs.texts[longer] == head.jobs.texts[added] + b"more\n"
    listing = verb("docs")
    assert listing.out == verb("docs", "list").out
    header, first, _ = listing.out.splitlines()
    assert header.split() == ["id", "name", "tokens", "size", "stored", "KV", "last", "use", "pinned", "expires"]
    assert first.split()[:3] == [added, "project", f"{len(head.jobs.texts[added])}"]
    assert first.split()[-2:] == ["pinned", "never"]
    assert [d["id"] for d in json.loads(verb("docs", "--json").out)] == [added, longer]
    assert verb("docs", "unpin", added, longer).out == f"{added} unpinned\n{longer} unpinned\n"
    assert verb("docs", "pin", longer).code == 0
    shown = verb("docs", "show", longer).out
    assert f"appended to  {added}" in shown
    assert json.loads(verb("docs", "show", longer, "--json").out)["pinned"]
    done = verb("docs", "read", longer, "--wait")
    assert (done.code, done.out[:4]) == (0, "job_")
    assert head.jobs.calls["Submit"][-1].document.read
    out = tmp_path / "it.longreach"
    done = verb("docs", "export", longer, out)
    assert (done.code, done.out) == (0, f"{out}: {out.stat().st_size}B\n")
    assert verb("docs", "export", longer, out).code == 2
    assert verb("docs", "export", longer, out, "--force", "--without-kv").code == 0
    assert verb("docs", "delete", longer).out == f"{longer} removed\n"
    assert verb("docs", "import", out).out == f"{longer}\n"
    assert verb("docs", "rm", longer, added).code == 0
    assert not head.jobs.files


def test_questions_about_documents(verb: CommandLine, head: FakeHead, project: Path, tmp_path: Path) -> None:
    added = verb("docs", "add", project).out.strip()
    (tmp_path / "b.pdf").write_bytes(pdf(["text of a page"]))
    answer = "".join(WORDS).strip()
    for document in (["--document", added], ["--document", project]):
        done = verb("submit", *document, "--question", "Why?", "--wait")
        assert (done.code, done.out.strip()) == (0, answer)
        assert head.jobs.calls["Submit"][-1].document.document_id == added
    done = verb("submit", "--document", project, "--document", tmp_path / "b.pdf", "--question", "Why?")
    assert done.code == 0
    assert done.err.splitlines() == ["project: 1 file; left out: 1 binary file", "b.pdf: 1 page"]
    text = head.jobs.texts[head.jobs.calls["Submit"][-1].document.document_id].decode()
    assert text.index("==> project <==") < text.index("==> b.pdf <==\n[Page 1 of 1]\ntext of a page")


def test_several_files(verb: CommandLine, head: FakeHead, tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    done = verb("docs", "add", tmp_path / "b", tmp_path / "a", "--json")
    assert [document["name"] for document in json.loads(done.out)] == ["b", "a"]
    done = verb("docs", "add", "--together", "--name", "both", tmp_path / "b", tmp_path / "a", "--json")
    (both,) = json.loads(done.out)
    assert both["name"] == "both"
    assert head.jobs.texts[both["id"]] == b"==> b <==\nb\n\n==> a <==\na\n"
    assert verb("docs", "add", "--name", "x", tmp_path / "b", tmp_path / "a").code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["docs", "show", UNKNOWN], 4, "no such document"),
        (["docs", "pin", UNKNOWN], 4, "no such document"),
        (["docs", "delete", UNKNOWN], 4, "no such document"),
        (["docs", "append", UNKNOWN, "README.md"], 4, "no such document"),
        (["docs", "export", UNKNOWN, "out"], 4, "no such document"),
        (["submit", "--document", UNKNOWN, "--question", "Why?"], 4, "no such document"),
        (["docs", "add", "/absent"], 2, "/absent: cannot be read"),
        (["docs", "import", "/absent"], 2, "/absent: cannot be read"),
        (["docs", "text", "/dev/zero"], 2, "is binary: must be text, PDF"),
        (["docs", "append", UNKNOWN], 2, "Missing argument"),
        (["docs", "nonsense"], 2, "No such command"),
        (["tokens", "/absent"], 2, "/absent: cannot be read"),
        (["tokens", "README.md", "--config", "/absent.yaml"], 2, "/absent.yaml"),
    ],
    ids=range(13),
)
def test_mistakes_are_one_line(verb: CommandLine, arguments: list[str], code: int, said: str) -> None:
    done = verb(*[ROOT / word if word == "README.md" else word for word in arguments])
    assert (done.code, done.err.count("\n"), done.out) == (code, 1, ""), done.err
    assert done.err.startswith("longreach: error: ")
    assert said in done.err


def test_text_is_shown_without_a_head(longreach: CommandLine, project: Path) -> None:
    done = longreach("docs", "text", project)
    assert (done.code, done.out) == (0, "Files:\na.py\n\n==> a.py <==\nimport os\n")


def test_tokens(verb: CommandLine, head: FakeHead, project: Path, tmp_path: Path) -> None:
    (tmp_path / "long").write_text("x" * MAX_MODEL_LEN)
    done = verb("tokens", project)
    assert done.code == 0
    assert done.out.splitlines()[0].split() == ["source", "tokens", "size", "of", "4,096", "fits"]
    assert done.out.splitlines()[1].split() == [str(project), "36", "36B", "0.9%", "yes"]
    assert f"counted by the head at {head.address}" in done.err
    done = verb("tokens", project, tmp_path / "long", "--json")
    assert done.code == 1
    assert [(found["tokens"], found["fits"]) for found in json.loads(done.out)] == [(36, True), (MAX_MODEL_LEN, False)]
    together = json.loads(verb("tokens", "--together", project, tmp_path / "long", "--json").out)
    assert len(together) == 1
    assert not head.jobs.files
    head.stop()
    done = verb("tokens", project)
    assert (done.code, done.err.splitlines()[0]) == (3, "project: 1 file; left out: 1 binary file")
    assert "or count without a head: --config CONFIG" in done.err
    done = verb("tokens", project, "--config", ROOT / "configs" / "demo.yaml")
    assert done.code == 0
    assert "counted by the tokenizer of" in done.err


def test_reading_that_fails(verb: CommandLine, head: FakeHead, project: Path) -> None:
    added = verb("docs", "add", project).out.strip()
    head.jobs.outcome = pb.FAILED
    done = verb("docs", "read", added, "--wait")
    assert done.code == 1
    assert "the pipeline broke" in done.err.splitlines()[-1]
