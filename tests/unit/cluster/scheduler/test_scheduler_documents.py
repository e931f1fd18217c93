"""Documents: how much of one a question finds after it was read, and that nothing is found of a deleted one."""

from __future__ import annotations

import pytest

from cluster.scheduler.request import Status
from protos.model import grid
from protos.model.spec import ModelSpec
from tests.support.rigs.scheduler import GRID, PAGE, PLAIN, SCALED, SPARSE, expected_output, long_spec, request
from tests.support.rigs.stored_scheduler import BLOCK, StoredHarness, submit_and

DOCUMENT = list(range(1000, 1400))
HEAD, READ, QUESTION = [1, 2, 3, 4, 5], [6, 7, 8], list(range(20, 37))  # chat head, what a read job asks, a question


def asked(document: list[int], question: list[int]) -> list[int]:
    return [*HEAD, *document, *question]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("spec", [PLAIN, SCALED, SPARSE, GRID])
@pytest.mark.parametrize("size", [155, 193, 387])
def test_a_read_job_covers_a_document_up_to_the_last_legal_cut(spec: ModelSpec, size: int, in_memory: bool) -> None:
    """In memory to the page, stored to the block."""
    document = DOCUMENT[:size]
    harness = StoredHarness(pages=200, spec=spec)
    submit_and(harness, request(1, asked(document, READ), 1, document_id="doc", pinned_len=600))
    if not in_memory:
        harness = StoredHarness(pages=200, spec=spec, disk=harness.disk)
    question = request(2, asked(document, QUESTION), document_id="doc", pinned_len=600)
    submit_and(harness, question)
    assert question.output == expected_output(question.prompt, 3)
    shared = grid.last_cut(spec, len(HEAD) + size, question.num_prompt)
    unit = PAGE if in_memory else BLOCK
    assert question.num_cached == grid.last_cut(spec, shared // unit * unit, question.num_prompt) // PAGE * PAGE


@pytest.mark.parametrize("spec", [SCALED, long_spec(100, 16), long_spec(100, 16, 160, original=64)])
@pytest.mark.parametrize("size", [993, 1040])
def test_a_document_that_grows_by_a_tenth_reads_at_most_twelve_percent(spec: ModelSpec, size: int) -> None:
    first = list(range(1000, 1000 + size))
    grown = [*first, *range(7000, 7000 + size // 10)]
    scale = 2 * size
    harness = StoredHarness(pages=200, spec=spec)
    submit_and(harness, request(1, asked(first, QUESTION), 1, document_id="first", pinned_len=scale))
    for disk in (harness.disk, {}):  # in a new cluster, and in this one
        other = harness if not disk else StoredHarness(pages=200, spec=spec, disk=dict(disk))
        question = request(2, asked(grown, QUESTION), 1, document_id="grown", pinned_len=scale)
        submit_and(other, question)
        assert question.output == expected_output(question.prompt, 1)
        assert question.num_prompt - question.num_cached <= 0.12 * size + len(HEAD) + len(QUESTION)


@pytest.mark.parametrize("spec", [PLAIN, GRID])
@pytest.mark.parametrize("steps", range(-3, 9))
def test_nothing_is_found_of_a_deleted_document_whatever_its_requests_are_doing(spec: ModelSpec, steps: int) -> None:
    """While they wait, load (-3 .. -1), compute, or after their end; cancelled with it, or only later."""
    disk: dict = {}
    if steps < 0:
        submit_and(StoredHarness(pages=200, spec=spec, disk=disk), request(1, DOCUMENT, pinned_len=500))
    harness = StoredHarness(pages=200, spec=spec, disk=disk)
    item = request(1, [*DOCUMENT, 7], 3, document_id="doc", pinned_len=500)
    other = request(2, [*range(7000, 7100)], 3, document_id="other")
    harness.add(item, other)
    harness.collect()
    if steps == -2:
        harness.answer_look_up()
    if steps == -1:
        harness.answer_look_up()
        harness.schedule()
    for _ in range(max(0, steps)):
        harness.schedule()
        if harness.in_flight:
            harness.commit()
    harness.scheduler.keep_documents({"other"}, 3)
    harness.check()

    def found() -> set[float]:
        starts = {harness.late.slots[page * PAGE][1] for page in harness.pool.published()}
        return {start // 1000 for start in starts}

    assert found() <= {7}
    harness.run()
    harness.store_all()
    harness.check()
    assert found() == {7}, "nor what it has computed since"
    assert item.output == expected_output(item.prompt, 3)
    harness.add(again := request(3, [*DOCUMENT, 7], 3, document_id="doc", pinned_len=500))
    harness.disk.clear()
    harness.run()
    assert again.num_cached == 0
    assert found() == {1, 7}, "it was added again"


def test_pages_of_two_documents_stay_as_long_as_one_of_them() -> None:
    harness = StoredHarness(pages=200)
    one, two, plain = ([*DOCUMENT[:192], *range(base, base + 64)] for base in (3000, 4000, 5000))
    submit_and(harness, request(1, one, document_id="one"))
    submit_and(harness, request(2, two, document_id="two"))
    submit_and(harness, request(3, plain))
    pages = len(harness.pool.published())
    assert pages == (192 + 3 * 64) // PAGE
    harness.scheduler.keep_documents({"two"}, 4)
    assert len(harness.pool.published()) == pages - 64 // PAGE
    assert harness.pool.match(harness.requests[2].hashes) != ()
    harness.scheduler.keep_documents(set(), 4)
    assert len(harness.pool.published()) == 64 // PAGE, "of the plain prompt, and not found by itself"
    assert harness.pool.match(harness.requests[3].hashes) == ()


def test_nobody_waits_for_a_request_whose_document_is_gone() -> None:
    harness = StoredHarness(pages=200)
    harness.add(leader := request(1, DOCUMENT, document_id="doc"))
    harness.schedule()
    harness.add(follower := request(2, DOCUMENT))
    harness.collect()
    assert follower.status is Status.WAITING
    harness.scheduler.keep_documents(set(), 4)
    harness.run()
    assert (leader.num_cached, follower.num_cached) == (0, 0)
    assert leader.output == follower.output == expected_output(DOCUMENT, 3)
