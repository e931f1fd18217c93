"""The length scale that is pinned to a document: which one its jobs use, and what a document that grows shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.engine.engine import Engine
from cluster.engine.request_handle import RequestHandle
from cluster.jobs.model import JobConflict, JobInput, JobRecord, JobSpec, JobState
from protos.jobs.sampling import AnswerOptions
from protos.model.spec import DualChunkSpec
from tests.support.rigs.service import Bench

TEXT = b"The code of dark river is 1. " * 40


def set_scale(bench: Bench, original: int) -> None:
    deployment = bench.runtime.deployment
    spec = replace(deployment.spec, dual_chunk=DualChunkSpec(512, 64, original))
    bench.runtime.deployment = replace(deployment, spec=spec)


def submit(bench: Bench, document_id: str, question: str = "What?", wait: bool = True) -> JobRecord:
    spec = JobSpec(JobInput(document_id, (question,)), AnswerOptions(max_tokens=2))
    record = bench.service.submit(spec)
    return bench.service.wait(record.id, 20) if wait else record


def pinned_lens(bench: Bench, record: JobRecord) -> list[int]:
    return [handle.request.pinned_len for handle in bench.service._live[record.id].handles]


@pytest.fixture
def scaled(bench: Bench) -> Bench:
    set_scale(bench, 64)
    return bench


def test_questions_of_different_lengths_use_one_scale(scaled: Bench) -> None:
    limit = scaled.runtime.max_model_len
    document = scaled.service.add_document("a", [TEXT], 1 << 20)
    scaled.runtime.shard.hold()
    records = [submit(scaled, document.id, question, wait=False) for question in ("What?", "Who? " * 50)]
    (length,) = {record.reproducibility["scale_len"] for record in records}
    assert length == scaled.service.documents.get(document.id).scale_len == min(limit, 8192)
    assert [pinned_lens(scaled, record) for record in records] == [[length], [length]]


def test_a_length_to_grow_to_is_inherited_and_a_longer_prompt_uses_its_own(scaled: Bench) -> None:
    first = scaled.service.add_document("a", [b"short"], 1 << 20, max_tokens=100)
    child = scaled.service.add_document("a", [TEXT], 1 << 20, append_to=first.id)
    assert child.scale_len == first.scale_len == 100
    assert submit(scaled, first.id).reproducibility["scale_len"] == 100
    record = submit(scaled, child.id)
    assert record.reproducibility["scale_len"] == record.answers[0].prompt_tokens > 100


def test_a_known_document_keeps_its_scale_and_says_so(scaled: Bench) -> None:
    add = scaled.service.add_document
    first = add("a", [TEXT], 1 << 20, max_tokens=4000)
    for max_tokens in (0, 4000):
        again = add("b", [TEXT], 1 << 20, max_tokens=max_tokens)
        assert (again.id, again.scale_len) == (first.id, 4000)
    with pytest.raises(JobConflict, match=f"max_tokens: 3000: document {first.id} is known with 4000, on which"):
        add("b", [TEXT], 1 << 20, max_tokens=3000)
    assert scaled.service.documents.read(first.id) == TEXT
    scaled.service.documents.delete(first.id)
    assert add("b", [TEXT], 1 << 20, max_tokens=3000).scale_len == 3000


def test_what_is_appended_has_the_scale_of_what_comes_before_though_that_is_not_counted_yet(scaled: Bench) -> None:
    first = scaled.service.add_document("a", [TEXT], 1 << 20)
    child = scaled.service.add_document("a", [b"more"], 1 << 20, append_to=first.id)
    assert child.scale_len == scaled.service.documents.get(first.id).scale_len > 0


def test_a_text_that_comes_with_a_question_uses_its_own_length_until_it_is_registered(scaled: Bench) -> None:
    with scaled.service.keep_text(TEXT.decode(), 1 << 20) as document:
        record = submit(scaled, document.id)
    assert record.reproducibility["scale_len"] == record.answers[0].prompt_tokens
    again = scaled.service.add_document("a", [TEXT], 1 << 20)
    assert again.id == document.id
    assert submit(scaled, document.id).reproducibility["scale_len"] > record.answers[0].prompt_tokens


@pytest.mark.parametrize("original", [0, None])
def test_without_a_length_scale_nothing_is_pinned(bench: Bench, original: int | None) -> None:
    if original is not None:
        set_scale(bench, original)
    document = bench.service.add_document("a", [TEXT], 1 << 20, max_tokens=100)
    submit(bench, document.id)
    assert bench.service.documents.get(document.id).scale_len == 0


def test_jobs_resume_with_the_scale_they_were_submitted_with(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of before, whose document had none."""
    submitted: list[int] = []
    submit_all = Engine.submit_all

    def note(self: Engine, items: Sequence[Any], after: int = 0) -> list[RequestHandle]:
        submitted.extend(spec.pinned_len for spec, _ in items)
        return submit_all(self, items, after)

    monkeypatch.setattr(Engine, "submit_all", note)
    set_scale(bench, 64)
    with bench.service.keep_text(TEXT.decode(), 1 << 20) as document:
        bench.runtime.shard.hold()
        record = submit(bench, document.id, wait=False)
    (before,) = pinned_lens(bench, record)
    bench.service.add_document("a", [TEXT], 1 << 20)
    bench.service.count_document(document.id)
    assert bench.service.documents.get(document.id).scale_len > before
    bench.restart()
    ended = bench.service.wait(record.id, 20)
    assert submitted == [before] * 2, "once by each head"
    assert (ended.state, ended.reproducibility["scale_len"]) == (JobState.SUCCEEDED, before)
    set_scale(bench, 64)
    assert submit(bench, document.id).reproducibility["scale_len"] > before


def test_a_document_that_grows_is_not_read_again(bench: Bench) -> None:
    page = 16
    first = bench.service.add_document("a", [TEXT], 1 << 20)
    submit(bench, first.id)
    child = bench.service.add_document("a", [TEXT[: len(TEXT) // 10]], 1 << 20, append_to=first.id)
    answer = submit(bench, child.id, "And now?").answers[0]
    ids = len(bench.service.document_tokens.count(first.id))
    assert answer.cached_tokens >= ids // page * page - page
    other = bench.service.add_document("a", [TEXT + b"x"], 1 << 20)
    assert other.parent == ""
