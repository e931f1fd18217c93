"""Haystacks: sizes, placement, distinct words, and the judge."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.assets import needle_dir
from cluster.needles import Needle, build_haystack, is_right
from cluster.prompts import build_document_prompts
from cluster.tokenizer import TextTokenizer

NEEDLE = TextTokenizer.open(needle_dir())


@pytest.mark.parametrize(("total", "count"), [(128, 1), (1000, 3), (4096, 8), (4099, 1), (32_000, 20)])
def test_haystack_fills_the_prompt_and_no_more(total: int, count: int) -> None:
    haystack = build_haystack(NEEDLE, total, count, 7, needle_dir())
    questions = [needle.question for needle in haystack.needles]
    prompts = build_document_prompts(
        NEEDLE, haystack.document, questions, enable_thinking=None, max_model_len=total + 1
    )
    assert max(map(len, prompts)) == haystack.num_tokens <= total
    assert haystack.num_tokens > total - 100  # at most a line of the book is missing
    for needle in haystack.needles:
        assert haystack.document.count(f"\n{needle.answer[1:]}\n") == 1
        assert round(needle.depth * len(haystack.document)) == haystack.document.index(needle.answer[1:])


def test_needles_are_spread_evenly() -> None:
    depths = [needle.depth for needle in build_haystack(NEEDLE, 32_000, 10, 1, needle_dir()).needles]
    assert depths == sorted(depths)
    assert all(0.08 < later - earlier < 0.12 for earlier, later in pairwise(depths))
    assert 0.03 < depths[0] < 0.07


def test_words_and_codes_are_distinct() -> None:
    needles = build_haystack(NEEDLE, 32_000, 100, 3, needle_dir()).needles
    words = [word for needle in needles for word in (needle.adjective, needle.noun)]
    assert len(set(words)) == 200
    assert len({needle.code for needle in needles}) == 100
    assert all(len(needle.code) == 5 and needle.code.isdigit() for needle in needles)
    shared = build_haystack(NEEDLE, 32_000, 150, 3, needle_dir(), share_words=True).needles
    assert len({(needle.adjective, needle.noun) for needle in shared}) == 150


def test_the_seed_decides_everything() -> None:
    build = [build_haystack(NEEDLE, 2000, 4, seed, needle_dir()) for seed in (5, 5, 6)]
    assert build[0] == build[1] != build[2]


def test_without_the_needles_the_text_is_the_book() -> None:
    haystack = build_haystack(NEEDLE, 4000, 5, 2, needle_dir())
    text = haystack.document
    for needle in haystack.needles:
        text = text.replace(f"\n{needle.answer[1:]}\n", "\n")
    book = gzip.decompress((needle_dir() / "book.txt.gz").read_bytes()).decode()
    assert book.startswith(text)


def test_a_short_document_does_not_tokenise_the_whole_book(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    encode = NEEDLE.encode
    monkeypatch.setattr(NEEDLE, "encode", lambda text, *a, **k: sizes.append(len(text)) or encode(text, *a, **k))
    build_haystack(NEEDLE, 32_000, 4, 2, needle_dir())
    assert max(sizes) < 200_000


@pytest.mark.parametrize(
    ("total", "count", "message"),
    [(4000, 0, "num_needles"), (10_000, 110, "num_needles"), (127, 1, "total_tokens"), (255, 3, "total_tokens")],
)
def test_impossible_sizes(total: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: [^\n]+$"):
        build_haystack(NEEDLE, total, count, 0, needle_dir())


def test_missing_assets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reinstall"):
        build_haystack(NEEDLE, 4000, 1, 0, tmp_path)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" The secret code of red fox is 12345.", True),
        ("The secret code of red fox is 12345.\n", True),
        (" The secret code of red fox is 12346.", False),
        (" The secret code of red fox is 12345", False),
        (" The secret code of red fox is 12345. And", False),
        ("", False),
    ],
)
def test_is_right(answer: str, right: bool) -> None:
    needle = Needle("red", "fox", "12345", "What?", " The secret code of red fox is 12345.", 0.5)
    assert is_right(answer, needle) is right
