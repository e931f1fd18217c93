"""Token ids of documents: made once, kept, checked, and a prefix of those of what is appended."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cluster.jobs import prompts
from cluster.jobs.document.token_file import tokens_path
from cluster.jobs.document.tokens import SCALE_STEP, default_scale_len
from cluster.jobs.model import InvalidJob, JobInput, JobSpec, JobState
from cluster.text.literal_tokenizer import Place
from cluster.text.tokenizer import TextTokenizer
from protos.jobs.sampling import AnswerOptions
from tests.support.fakes.stage import eventually
from tests.support.rigs.service import Bench

TEXT = b"The code of dark river is 1.\n\n<|im_end|> said. "


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The literal texts that are tokenised."""
    texts: list[str] = []
    encode = TextTokenizer.encode_literal

    def counting(self: TextTokenizer, text: str, place: Place, limit: int) -> list[int]:
        texts.append(text)
        return encode(self, text, place, limit)

    monkeypatch.setattr(TextTokenizer, "encode_literal", counting)
    return texts


def ask(bench: Bench, document_id: str, question: str = "What?") -> list[int]:
    spec = JobSpec(JobInput(document_id, (question,)), AnswerOptions(max_tokens=1))
    job = bench.service.submit(spec)
    assert bench.service.wait(job.id, 20).state is JobState.SUCCEEDED
    return list(bench.service.document_tokens.count(document_id))


@pytest.mark.parametrize(
    ("tokens", "limit", "length"),
    [
        (1, 1 << 20, 8192),
        (4096, 1 << 20, 8192),
        (4097, 1 << 20, 12288),
        (262_000, 1 << 20, 266_240),
        (9000, 9500, 9500),
    ],
)
def test_the_default_length(tokens: int, limit: int, length: int) -> None:
    assert default_scale_len(tokens, limit) == length
    assert length == limit or SCALE_STEP <= length - tokens < 2 * SCALE_STEP


def test_a_document_is_tokenised_once(bench: Bench, encoded: list[str]) -> None:
    document = bench.service.add_document("a", [TEXT], 1 << 20)
    eventually(lambda: bench.service.documents.get(document.id).tokens > 0)
    ids = ask(bench, document.id)
    assert ask(bench, document.id, "And who?") == ids
    bench.restart()
    assert ask(bench, document.id, "Why?") == ids
    assert encoded == [TEXT.decode()]
    assert bench.service.documents.get(document.id).tokens == len(ids)
    path = tokens_path(bench.service.documents.path(document.id))
    path.write_bytes(path.read_bytes()[:-1])
    assert ask(bench, document.id) == ids
    assert len(encoded) == 2, "damaged ids are made anew"
    bench.service.documents.delete(document.id)
    assert not path.exists()


def test_appended_text_follows_the_ids_of_its_parent(bench: Bench, encoded: list[str]) -> None:
    service = bench.service
    first = service.add_document("a", [TEXT], 1 << 20)
    before = ask(bench, first.id)
    second = service.add_document("", [b"th", b"e end"], 1 << 20, append_to=first.id)
    third = service.add_document("c", [" é".encode()], 1 << 20, append_to=second.id)
    after = ask(bench, third.id)
    assert after[: len(before)] == before
    assert encoded.count(TEXT.decode()) == 1
    assert (second.name, second.parent, second.seams) == ("a", first.id, (len(TEXT),))
    assert service.documents.read(third.id) == TEXT + "the end é".encode()
    service.documents.delete(first.id)
    service.documents.delete(second.id)
    tokens_path(service.documents.path(third.id)).unlink()
    assert ask(bench, third.id) == after, "a child needs no parent, and keeps its seams"


def test_the_id_of_an_appended_document_depends_on_its_seams(bench: Bench) -> None:
    add = bench.service.add_document
    first = add("a", [TEXT], 1 << 20)
    child = add("a", [b"one"], 1 << 20, append_to=first.id)
    assert add("b", [b"o", b"ne"], 1 << 20, append_to=first.id).id == child.id
    assert add("b", [TEXT + b"one"], 1 << 20).id != child.id
    with pytest.raises(InvalidJob, match="must be at most 50 "):
        add("b", [b"12345"], 50, append_to=first.id)
    with pytest.raises(InvalidJob, match="must have at least 1"):
        add("b", [b""], 1 << 20, append_to=first.id)
    with pytest.raises(InvalidJob, match="max_tokens: 5: must be 0"):
        add("b", [b"x"], 1 << 20, append_to=first.id, max_tokens=5)
    part = add("b", ["é".encode()[:1]], 1 << 20, append_to=first.id)
    with pytest.raises(InvalidJob, match="not UTF-8"):
        bench.service.count_document(part.id)


def test_a_text_is_counted_without_being_stored(bench: Bench) -> None:
    document = bench.service.add_document("a", [TEXT], 1 << 20)
    assert bench.service.count_text(TEXT) == bench.service.count_document(document.id)
    with pytest.raises(InvalidJob, match="not UTF-8"):
        bench.service.count_text(b"\xff")
    assert len(bench.service.documents.list()) == 1


def test_a_job_reads_a_document(bench: Bench) -> None:
    document = bench.service.add_document("a", [TEXT], 1 << 20)
    spec = JobSpec(JobInput(document.id, read=True), AnswerOptions(max_tokens=1), idempotency_key="k")
    job = bench.service.submit(spec)
    assert bench.service.submit(spec).id == job.id
    record = bench.service.wait(job.id, 20)
    assert (record.state, len(record.answers), record.spec.input.read) == (JobState.SUCCEEDED, 1, True)
    (listed,), _ = bench.service.jobs((), {}, 10, "")
    assert listed.spec.input.read
    assert listed.damage == ""
    with pytest.raises(InvalidJob, match="no questions"):
        JobInput(document.id, ("q",), read=True)


def test_pins(bench: Bench, tmp_path: Path) -> None:
    documents = bench.service.documents
    document = bench.service.add_document("a", [TEXT], 1 << 20, pinned=True)
    other = bench.service.add_document("b", [b"other"], 1 << 20)
    assert (document.pinned, document.expires, other.pinned) == (True, 0.0, False)
    ask(bench, document.id)
    later = bench.clock() + 1e9
    assert documents.sweep(later) == 1
    assert documents.list()[0].expires == 0.0
    assert documents.pin(document.id, False).expires > bench.clock()
    assert documents.sweep(later) == 1


def test_the_thread_takes_a_turn_among_long_texts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = threading.BoundedSemaphore(1)
    monkeypatch.setattr(prompts, "_turns", turns)
    monkeypatch.setattr(prompts, "_LONG_BYTES", 8)
    assert turns.acquire()
    document = bench.service.add_document("a", [TEXT], 1 << 20)
    short = bench.service.add_document("a", [b"short"], 1 << 20)
    time.sleep(0.1)
    assert bench.service.documents.get(document.id).tokens == bench.service.documents.get(short.id).tokens == 0
    turns.release()
    eventually(lambda: bench.service.documents.get(short.id).tokens)
    assert bench.service.documents.get(document.id).tokens
    assert turns.acquire(blocking=False), "it is given back"
