"""How a step's tokens are shared: a table of cases, and the promises for any case."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.scheduler.chunking import Chunk, DynamicChunks, PrefillShare, chunks, fit_to_grid, share_budget
from protos.model.grid import is_sparse, largest_cell, last_cut, next_cut, whole_cells
from protos.model.spec import ModelSpec
from tests.support.rigs.scheduler import long_spec


@pytest.mark.parametrize(
    ("budget", "remaining", "shares"),
    [
        (8, [], []),
        (8, [0, 0], [0, 0]),
        (8, [1], [1]),
        (8, [7], [7]),
        (8, [8], [8]),
        (8, [9], [8]),
        (8, [100, 1], [7, 1]),
        (8, [100, 100], [4, 4]),
        (7, [100, 100], [4, 3]),
        (8, [100, 2], [4, 2]),
        (8, [100, 50, 2], [4, 2, 2]),
        (8, [2, 100], [2, 6]),
        (8, [100, 3, 3, 3], [4, 3, 1, 0]),
        (1, [100], [1]),
        (1, [100, 1], [0, 1]),
        (2, [1, 1, 1], [1, 1, 0]),
        (2, [100, 1, 0, 1], [1, 1, 0, 0]),
        (3, [100, 1, 0, 1], [1, 1, 0, 1]),
    ],
)
def test_cases(budget: int, remaining: list[int], shares: list[int]):
    assert share_budget(budget, remaining) == shares


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 300), st.lists(st.one_of(st.integers(0, 3), st.integers(0, 1000)), max_size=12))
def test_promises(budget: int, remaining: list[int]):
    shares = share_budget(budget, remaining)
    assert len(shares) == len(remaining)
    assert all(0 <= share <= wanted for share, wanted in zip(shares, remaining, strict=True))
    assert sum(shares) <= budget, "the budget is kept"
    if sum(wanted > 1 for wanted in remaining) <= 1:
        assert sum(shares) == min(budget, sum(remaining)), "alone, a prefill uses all of it"
    singles = [share for share, wanted in zip(shares, remaining, strict=True) if wanted == 1]
    prefills = [(share, wanted) for share, wanted in zip(shares, remaining, strict=True) if wanted > 1]
    room = max(1, budget - 1) if prefills else budget
    assert sum(singles) == min(len(singles), room), "single tokens come first, beside a prefill they leave one"
    if prefills:
        share, wanted = prefills[0]
        assert share >= min(wanted, -(-(budget - sum(singles)) // 2)), "the oldest prefill gets at least half"
        others = sorted(prefills[1:], key=lambda pair: pair[1])
        unfinished = [share < wanted for share, wanted in others]
        assert unfinished == sorted(unfinished), "shorter ones are served before longer ones"


@pytest.mark.parametrize(("tokens", "steps"), [(0, 0), (1, 1), (255, 1), (256, 1), (257, 2), (1009, 4)])
def test_steps_of_a_prefill(tokens: int, steps: int):
    assert len(list(chunks(None, 0, tokens, tokens, 256))) == steps


# --- cells ------------------------------------------------------------------------------------------------------------

SPARSE = long_spec(100, 64)
GRID = long_spec(100, 64, 160)  # cells 64, 64, 32, ...
DCA = long_spec(None, distance=96)


@pytest.mark.parametrize(
    ("spec", "shares", "lengths", "deficits"),
    [
        (None, [(0, 1000, 64), (5, 9, 3)], [64, 3], [0, 0]),
        (SPARSE, [(0, 100, 64)], [64], [0]),  # dense: not above the threshold
        (SPARSE, [(0, 1000, 1)], [64], [0]),  # a whole cell whatever is granted
        (SPARSE, [(0, 1000, 63)], [64], [0]),
        (SPARSE, [(0, 1000, 127)], [64], [0]),
        (SPARSE, [(0, 1000, 128)], [128], [0]),
        (SPARSE, [(960, 1000, 40)], [40], [0]),  # the last cell ends with the prompt
        (SPARSE, [(1000, 1000, 1)], [1], [0]),  # a generated token
        (SPARSE, [(1000, 1000, 17)], [17], [0]),  # generated tokens computed again
        (SPARSE, [(0, 1000, 0)], [0], [0]),
        (
            SPARSE,
            [(0, 1000, 32), (0, 50, 31), (70, 70, 1)],
            [64, 31, 1],
            [0, 0, 0],
        ),  # others get their grant
        (SPARSE, [(0, 1000, 32), (0, 900, 32)], [64, 0], [-32, 32]),  # the older one first,
        (SPARSE, [(64, 1000, 32, -32), (0, 900, 32, 32)], [0, 64], [0, 0]),  # then the other
        (SPARSE, [(0, 1000, 64), (0, 900, 64)], [64, 64], [0, 0]),
        (SPARSE, [(0, 1000, 32), (960, 961, 1)], [64, 1], [-32, 0]),  # what fits into its own grant is never put off
        (
            SPARSE,
            [(0, 1000, 32, 60), (0, 900, 0, 50)],
            [64, 0],
            [0, 50],
        ),  # nothing granted: its deficit stays
        (GRID, [(128, 1000, 32)], [32], [0]),
        (GRID, [(128, 1000, 63)], [32], [0]),
        (GRID, [(128, 1000, 64)], [64], [0]),
        (DCA, [(0, 1000, 64)], [64], [0]),
        (DCA, [(64, 1000, 64)], [32], [0]),  # a dense slice ends with its chunk
        (DCA, [(96, 1000, 64), (191, 1000, 1)], [64, 1], [0, 0]),
    ],
)
def test_fit_to_grid(spec: ModelSpec | None, shares: list[tuple[int, ...]], lengths: list[int], deficits: list[int]):
    assert fit_to_grid(spec, [PrefillShare(*share) for share in shares]) == (lengths, deficits)


@st.composite
def traffic(draw: st.DrawFn) -> tuple[ModelSpec, int, list[PrefillShare]]:
    spec = draw(st.sampled_from([SPARSE, GRID, DCA, long_spec(0, 16, 48)]))
    budget, prompts = draw(st.integers(1, 300)), []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(1, 600))
        prompts.append((last_cut(spec, draw(st.integers(0, size)), size), size))
    granted = share_budget(budget, [size - at or 1 for at, size in prompts])
    limit = largest_cell(spec)
    shares = [
        PrefillShare(*prompt, n, draw(st.integers(-limit, limit))) for prompt, n in zip(prompts, granted, strict=True)
    ]
    return spec, budget, shares


@settings(max_examples=400, deadline=None)
@given(traffic())
def test_promises_of_cells(case: tuple[ModelSpec, int, list[PrefillShare]]):
    spec, budget, shares = case
    lengths, deficits = fit_to_grid(spec, shares)
    assert sum(lengths) <= budget + largest_cell(spec), "at most one cell above the budget"
    assert any(lengths), "a step always gets somewhere"
    assert all(abs(deficit) <= largest_cell(spec) for deficit in deficits)
    for share, length in zip(shares, lengths, strict=True):
        border = next_cut(spec, share.position, share.prompt_len)
        if is_sparse(spec, share.position, share.prompt_len):
            assert not length or length == whole_cells(spec, share.position, length, share.prompt_len)
        elif share.granted:
            assert length == (share.granted if border is None else min(share.granted, border - share.position))
        if not share.granted:
            assert not length


def test_two_sparse_prompts_get_equal_turns():
    shares, done = [PrefillShare(0, 6400, 24), PrefillShare(0, 640, 24)], [0, 0]
    for _ in range(20):
        lengths, deficits = fit_to_grid(SPARSE, shares)
        done = [a + b for a, b in zip(done, lengths, strict=True)]
        if done[1] == 640:
            break
        shares = [PrefillShare(at, s.prompt_len, 24, c) for at, s, c in zip(done, shares, deficits, strict=True)]
    assert done == [640, 640]


@pytest.mark.parametrize(
    ("spec", "tokens", "expected"),
    [
        (None, 100, [(0, 50), (50, 100)]),
        (SPARSE, 100, [(0, 50), (50, 100)]),
        (SPARSE, 130, [(0, 64, True), (64, 128, True), (128, 130, True)]),
        (GRID, 200, [(0, 64, True), (64, 128, True), (128, 160, True), (160, 200, True)]),
        (DCA, 130, [(0, 50), (50, 96), (96, 130)]),
    ],
)
def test_chunks_of_a_lone_prompt(spec: ModelSpec | None, tokens: int, expected: list[tuple[int, ...]]):
    assert list(chunks(spec, 0, tokens, tokens, 50)) == [Chunk(*item) for item in expected]


DYNAMIC = DynamicChunks(stages=4, budget=1024, row=100_000, pair=10)


def seconds(dynamic: DynamicChunks, chunk: Chunk) -> int:
    length = chunk.stop - chunk.start
    return length * dynamic.row + dynamic.pair * length * (2 * chunk.start + length + 1) // 2


@pytest.mark.parametrize("size", [1, 63, 1024, 1025, 67_193, 262_144])
@pytest.mark.parametrize("spec", [None, long_spec(None, distance=8192)])
def test_dynamic_chunks_take_no_longer_than_one_near_the_beginning(spec: ModelSpec | None, size: int):
    found = list(chunks(spec, 0, size, size, DYNAMIC.budget, DYNAMIC))
    assert [chunk.start for chunk in found] == [0, *(chunk.stop for chunk in found[:-1])]
    assert found[-1].stop == size
    lengths = [chunk.stop - chunk.start for chunk in found]
    assert max(lengths) <= DYNAMIC.budget
    assert all(length % 64 == 0 for length in lengths[:-1])
    longest = DYNAMIC.budget * (DYNAMIC.row + DYNAMIC.pair * size / DYNAMIC.stages)
    assert max(seconds(DYNAMIC, chunk) for chunk in found) <= longest * 1.01
    if spec is None:
        assert lengths == sorted(lengths, reverse=True)


def test_dynamic_chunks_have_an_eighth_of_the_budget_at_least():
    attention_alone = DynamicChunks(stages=64, budget=1024, row=0, pair=1)
    assert attention_alone.most(0, 1 << 20) == 1024
    assert attention_alone.most((1 << 20) - 1, 1 << 20) == 128
    assert DynamicChunks(stages=64, budget=100, row=0, pair=1).most((1 << 20) - 1, 1 << 20) == 64
    assert DynamicChunks(stages=64, budget=50, row=0, pair=1).most((1 << 20) - 1, 1 << 20) == 50


def test_sparse_cells_stay_whole_under_dynamic_chunks():
    shares = [PrefillShare(0, 500, 100), PrefillShare(0, 40, 40)]
    assert fit_to_grid(SPARSE, shares, DYNAMIC) == fit_to_grid(SPARSE, shares)
