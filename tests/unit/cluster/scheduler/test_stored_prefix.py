"""Stored prefixes: what is looked up and loaded, and that no page is lost and no wrong content adopted."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler.request import FinishReason, Request, Status
from protos.model.spec import ModelSpec
from tests.support.rigs.scheduler import (
    GRID,
    PAGE,
    PLAIN,
    SCALED,
    SPARSE,
    check_cells,
    expected_output,
    long_spec,
    request,
)
from tests.support.rigs.stored_scheduler import BLOCK, StoredHarness, submit_and

DOCUMENT = list(range(1000, 1400))


def disk_with(*prompts: list[int], spec: ModelSpec = PLAIN) -> dict:
    """Return what another cluster, which has ended since, has stored of prompts."""
    harness = StoredHarness(pages=200, spec=spec)
    submit_and(harness, *(request(index, prompt) for index, prompt in enumerate(prompts)))
    return harness.disk


def behind_a_cancelled_one(steps: int) -> tuple[StoredHarness, Request]:
    """Return a request whose load needs pages that so many steps in flight of a cancelled request write to."""
    harness = StoredHarness(pages=27, disk=disk_with(DOCUMENT))
    harness.add(first := request(1, [9] * 400, 2))
    harness.collect()
    harness.answer_look_up()
    for _ in range(steps):
        harness.schedule()
    harness.scheduler.stop(first, FinishReason.CANCELLED)
    harness.add(item := request(2, DOCUMENT, 2))
    harness.collect()
    harness.answer_look_up()
    return harness, item


def ask(prompt: list[int], disk: dict, spec: ModelSpec = PLAIN, **options: object) -> tuple[int, StoredHarness]:
    """Ask in a new cluster; returns how many tokens were cached."""
    harness = StoredHarness(pages=100, spec=spec, disk=disk, **options)
    item = request(1, prompt)
    submit_and(harness, item)
    assert item.output == expected_output(prompt, 3)
    check_cells(harness, spec)
    return item.num_cached, harness


@pytest.mark.parametrize(
    ("spec", "common", "cached"),
    [
        (PLAIN, 31, 0), (PLAIN, 32, 32), (PLAIN, 67, 64), (PLAIN, 193, 192), (PLAIN, 400, 384),
        (SPARSE, 400, 384), (SPARSE, 130, 128), (SPARSE, 127, 64), (SPARSE, 63, 0),
        (GRID, 400, 384), (GRID, 170, 160), (GRID, 159, 128),
        (SCALED, 400, 384), (SCALED, 193, 192),
    ],
)  # fmt: skip
def test_a_stored_prefix_is_loaded_up_to_the_last_legal_cut(spec: ModelSpec, common: int, cached: int) -> None:
    disk = disk_with(DOCUMENT, spec=spec)
    prompt = [*DOCUMENT[:common], *range(5000, 5400 - common)]
    assert ask(prompt, disk, spec)[0] == cached


@pytest.mark.parametrize("spec", [PLAIN, SPARSE, GRID, SCALED])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 192, 193])
def test_the_same_prompt_again_computes_at_least_one_token(spec: ModelSpec, size: int) -> None:
    disk = disk_with(DOCUMENT[:size], spec=spec)
    cached, _ = ask(DOCUMENT[:size], disk, spec)
    assert cached <= size - 1
    if spec is PLAIN:
        assert cached == min(size // BLOCK * BLOCK, (size - 1) // PAGE * PAGE)


def test_nothing_is_looked_up_when_memory_has_as_much() -> None:
    harness = StoredHarness(pages=100)
    submit_and(harness, request(1, DOCUMENT))
    harness.add(again := request(2, [*DOCUMENT, 7]))
    harness.collect()
    assert (harness.look_ups, again.status, again.num_cached) == ([], Status.RUNNING, 400)
    harness.run()


def test_a_short_prompt_and_a_cluster_without_a_store_look_nothing_up() -> None:
    harness = StoredHarness()
    harness.add(request(1, DOCUMENT[: BLOCK - 1]))
    harness.step()
    assert harness.count(Status.RUNNING) == 1
    harness = StoredHarness(block=0)
    harness.add(request(1, DOCUMENT))
    harness.step()
    assert harness.count(Status.RUNNING) == 1
    assert harness.offers == []


def test_others_pass_a_request_that_is_looked_up_or_loaded() -> None:
    disk = disk_with(DOCUMENT)
    harness = StoredHarness(pages=100, disk=disk)
    harness.add(first := request(1, DOCUMENT, 2), second := request(2, [7] * 20, 2))
    harness.step()
    assert (first.status, second.status) == (Status.WAITING, Status.RUNNING)
    harness.answer_look_up()
    assert first.status is Status.LOADING
    assert harness.step() is not None
    assert second.status is Status.FINISHED
    assert first.num_scheduled == 0
    harness.answer_load()
    assert (first.status, first.num_cached) == (Status.RUNNING, 384)
    harness.run()
    assert first.output == expected_output(DOCUMENT, 2)


def test_followers_wait_for_a_prefix_that_is_loaded() -> None:
    disk = disk_with(DOCUMENT)
    harness = StoredHarness(pages=100, disk=disk)
    leader, *followers = (request(index, [*DOCUMENT, index], 2) for index in range(1, 4))
    harness.add(leader)
    harness.collect()
    harness.answer_look_up()
    harness.add(*followers)
    harness.collect()
    assert harness.look_ups == [], "the pages are about to be there"
    assert [item.status for item in followers] == [Status.WAITING] * 2
    harness.run()
    assert all(item.num_cached >= 384 for item in followers)
    assert harness.num_loaded == 12, "read once"
    assert all(item.output == expected_output(item.prompt, 2) for item in (leader, *followers))


@pytest.mark.parametrize("good", [0, 1, 5, 11])
@pytest.mark.parametrize("spec", [PLAIN, SPARSE, GRID])
def test_a_load_that_fails_in_part_goes_on_after_the_last_good_cut(spec: ModelSpec, good: int) -> None:
    disk = disk_with(DOCUMENT, spec=spec)
    harness = StoredHarness(pages=100, disk=disk, spec=spec)
    harness.add(item := request(1, DOCUMENT))
    harness.collect()
    harness.answer_look_up()
    harness.answer_load(fails_after=good)
    assert item.num_cached <= good * BLOCK
    assert spec is not PLAIN or item.num_cached == good * BLOCK
    harness.run()
    assert item.output == expected_output(DOCUMENT, 3)
    harness.store_all()
    check_cells(harness, spec)
    assert harness.pool.usage == 0


@pytest.mark.parametrize("at", ["look-up", "load", "loaded"])
def test_a_cancelled_request_leaves_no_page_and_keeps_what_was_read(at: str) -> None:
    disk = disk_with(DOCUMENT)
    harness = StoredHarness(pages=30, disk=disk)
    harness.add(item := request(1, DOCUMENT))
    harness.collect()
    if at != "look-up":
        harness.answer_look_up()
    if at == "loaded":
        harness.answer_load()
    harness.scheduler.stop(item, FinishReason.CANCELLED)
    assert item.finish_reason is FinishReason.CANCELLED
    if at == "load":
        assert harness.pool.usage > 0.8, "the shards may still write to its pages"
    harness.run()
    assert harness.pool.usage == 0
    harness.check()
    harness.add(again := request(2, DOCUMENT))
    harness.run()
    assert again.num_cached == 384
    assert again.output == expected_output(DOCUMENT, 3)
    assert harness.num_loaded == 12, "read once"


def test_a_load_waits_for_steps_that_still_write_to_its_pages() -> None:
    harness, item = behind_a_cancelled_one(2)
    assert (item.status, harness.loads) == (Status.LOADING, []), "its pages are still written to"
    harness.commit()
    assert harness.loads == []
    harness.commit()
    assert len(harness.loads) == 1
    harness.run()
    assert item.output == expected_output(DOCUMENT, 2)


def test_a_request_that_ends_before_its_load_begins_gives_its_pages_back_at_once() -> None:
    harness, item = behind_a_cancelled_one(1)
    harness.scheduler.stop(item, FinishReason.CANCELLED)
    assert harness.pool.usage == 0
    harness.commit()
    assert harness.loads == []
    harness.check()


def test_no_block_is_read_into_a_page_that_others_read() -> None:
    disk = disk_with(DOCUMENT)
    harness = StoredHarness(pages=100, disk=disk)
    harness.add(short := request(1, [*DOCUMENT[:48], 7], 40))  # three pages, one and a half blocks
    harness.collect()
    harness.answer_look_up()
    while harness.loads:
        harness.answer_load()
    harness.step()
    assert short.status is Status.RUNNING
    harness.add(item := request(2, DOCUMENT, 2))
    harness.collect()
    harness.answer_look_up()
    (load,) = harness.loads
    assert load.first == 1
    assert not {page for block in load.blocks for page in block.pages} & set(short.pages)
    harness.run()
    assert item.output == expected_output(DOCUMENT, 2)
    assert short.output == expected_output(short.prompt, 40)


def test_another_owner_and_other_kernels_find_nothing() -> None:
    disk = disk_with(DOCUMENT)
    for origin in (("other", ""), ("", "alice")):
        harness = StoredHarness(pages=100, disk=disk)
        item = request(1, DOCUMENT)
        item.origin = type(item.origin)(*origin)
        submit_and(harness, item)
        assert item.num_cached == 0
        assert item.output == expected_output(DOCUMENT, 3)


def test_two_documents_in_a_pool_for_one_come_from_the_store() -> None:
    harness = StoredHarness(pages=27)
    other = [token + 5000 for token in DOCUMENT]
    for turn in range(3):
        for offset, document in enumerate((DOCUMENT, other)):
            item = request(10 * turn + offset, [*document, turn], 2)
            submit_and(harness, item)
            assert item.output == expected_output(item.prompt, 2)
            assert item.num_cached == (384 if turn else 0)
    assert harness.num_loaded == 4 * 12


def test_a_prompt_of_another_length_scale_finds_nothing_unless_pinned() -> None:
    disk = disk_with(DOCUMENT, spec=SCALED)
    assert ask([*DOCUMENT, 7], disk, SCALED)[0] == 0
    harness = StoredHarness(pages=100, spec=SCALED, disk=disk)
    item = request(1, [*DOCUMENT[:390], 7], pinned_len=400)
    submit_and(harness, item)
    assert item.num_cached == 384


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from((PLAIN, SPARSE, GRID, SCALED, long_spec(100, 48))), seed=st.integers(0, 1 << 30),
    pages=st.sampled_from((27, 40, 80)), budget=st.sampled_from((16, 64, 200)), stages=st.sampled_from((1, 2)),
    share=st.booleans(), steps=st.integers(20, 120),
)  # fmt: skip
def test_no_page_is_lost_and_no_wrong_content_adopted(
    spec: ModelSpec, seed: int, pages: int, budget: int, stages: int, share: bool, steps: int
) -> None:
    """Random arrivals, answers in any order, loads that fail in part, drops, cancels, restarts over one disk."""
    rng = random.Random(seed)
    documents = [[base + i for i in range(340)] for base in (1000, 2000)]
    disk: dict = {}
    sequence = 0
    for _ in range(2):
        harness = StoredHarness(
            pages=pages, budget=budget, spec=spec, disk=disk, num_stages=stages, share_across_lengths=share, seqs=3
        )
        cancelled = set()
        for _ in range(steps):
            action = rng.randrange(10)
            if action == 0 or not harness.requests:
                sequence += 1
                document = rng.choice(documents)
                prompt = [
                    *document[: rng.randint(1, 340)],
                    *(9000 + rng.randrange(2) for _ in range(rng.randint(0, 40))),
                ]
                harness.add(request(sequence, prompt, rng.randint(1, 4), pinned_len=rng.choice((0, 0, 381))))
                harness.collect()
            elif action == 1 and harness.look_ups:
                harness.answer_look_up(rng.randrange(len(harness.look_ups)))
            elif action == 2 and harness.loads:
                fails = rng.choice((None, None, rng.randrange(12)))
                harness.answer_load(rng.randrange(len(harness.loads)), fails)
            elif action == 3 and harness.offers:
                harness.begin_write()
            elif action == 4 and harness.writes:
                harness.end_write(rng.randrange(len(harness.writes)))
            elif action == 5 and disk and rng.random() < 0.3:
                key = rng.choice(sorted(disk))
                del disk[key]
                harness.pool.unmark_stored([key])
            elif action == 6 and rng.random() < 0.4:
                item = rng.choice(list(harness.requests.values()))
                if item.status is not Status.FINISHED:
                    cancelled.add(item.sequence)
                harness.scheduler.stop(item, FinishReason.CANCELLED)
                harness.collect()
            elif action in (7, 8) and len(harness.in_flight) < 2:
                harness.schedule()
            elif harness.in_flight:
                harness.commit()
        while harness.writes:
            harness.end_write()
        harness.run()
        harness.store_all()
        harness.check()
        assert harness.pool.usage == 0
        assert harness.pool.num_available == pages
        for item in harness.requests.values():
            if item.sequence not in cancelled:
                assert item.output == expected_output(item.prompt, item.stop.max_tokens)
