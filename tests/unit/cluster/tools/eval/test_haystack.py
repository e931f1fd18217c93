"""Haystacks: sizes, placement, distinct words, and the judge."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from cluster.text.prompts import PromptError, build_document_prompts
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.eval.haystack import Form, Needle, Source, build_haystack, finds_code, is_right, read_source

NEEDLE = TextTokenizer.open(needle_dir())
SOURCE = read_source(needle_dir())


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


@pytest.mark.parametrize(("count", "sharing"), [(1, 0), (2, 2), (3, 2), (4, 2), (6, 3), (8, 4), (11, 5), (100, 50)])
def test_half_of_the_needles_share_a_word(count: int, sharing: int) -> None:
    for seed in range(5):
        needles = build_haystack(NEEDLE, 8192, count, seed, SOURCE, share_words=True).needles
        assert len({(needle.adjective, needle.noun) for needle in needles}) == count
        adjectives, nouns = (Counter(getattr(n, key) for n in needles) for key in ("adjective", "noun"))
        assert sum(adjectives[n.adjective] + nouns[n.noun] > 2 for n in needles) == sharing


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


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("The secret code of red fox is 12345.", True),
        ("**12345**", True),
        ("In chapter 3 it says 12345, not 54321.", True),
        ("54321, or 12345", False),
        ("123456", False),
        ("1234", False),
        ("", False),
    ],
)
def test_the_first_five_digits_count(answer: str, found: bool) -> None:
    needle = Needle("red", "fox", "12345", "What?", " The secret code of red fox is 12345.", 0.5)
    assert finds_code(answer, needle) is found
    assert is_right(" 12345. ", needle, begun=True)
    assert not is_right(" 12345 ", needle, begun=True)


def test_a_begun_answer_ends_before_the_code() -> None:
    form = Form(begun=True)
    haystack = build_haystack(NEEDLE, 1000, 4, 7, SOURCE, form=form)
    prompts = form.prompts(NEEDLE, haystack.document, haystack.needles, 1001)
    assert max(map(len, prompts)) == haystack.num_tokens <= 1000
    plain = Form().prompts(NEEDLE, haystack.document, haystack.needles, 1001)
    for prompt, without, needle in zip(prompts, plain, haystack.needles, strict=True):
        ending = f"\nAnswer: The secret code of {needle.adjective} {needle.noun} is "
        assert NEEDLE.decode(prompt).endswith(ending)
        assert prompt[: len(without)] == without
        whole = NEEDLE.encode(NEEDLE.decode(prompt) + needle.code)  # the seams are where the model saw them in training
        assert whole[: len(prompt)] == prompt


def test_a_begun_answer_starts_after_the_white_space_of_a_template() -> None:
    files = [json.loads((needle_dir() / name).read_bytes()) for name in ("tokenizer.json", "tokenizer_config.json")]
    template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>{{ '\\n' }}"
    tokenizer = TextTokenizer(json.dumps(files[0]).encode(), files[1], template)
    needle = Needle("red", "fox", "12345", "What?", " The secret code of red fox is 12345.", 0.5)
    (prompt,) = Form(begun=True).prompts(tokenizer, "Text.", [needle], 1000)
    assert tokenizer.decode(prompt).endswith("<assistant>\nThe secret code of red fox is ")
    thinking = TextTokenizer(json.dumps(files[0]).encode(), files[1], template + "<think>")
    with pytest.raises(PromptError, match="answer form"):
        Form(begun=True).prompts(thinking, "Text.", [needle], 1000)


def test_documents_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("hope and joy " * 40)  # one line, and shorter than what is wanted
    haystack = build_haystack(NEEDLE, 1000, 5, 1, read_source(needle_dir(), path))
    assert 800 < haystack.num_tokens <= 1000
    depths = [needle.depth for needle in haystack.needles]
    assert depths == sorted(depths)
    assert all(abs(depth - (index + 0.5) / 5) < 0.05 for index, depth in enumerate(depths))
    for needle in haystack.needles:
        assert haystack.document.count(f"\n{needle.answer[1:]}\n") == 1
    for bad, message in ((tmp_path / "none.txt", "cannot be read"), (tmp_path / "empty.txt", "no text")):
        (tmp_path / "empty.txt").write_text(" \n")
        with pytest.raises(ValueError, match=message):
            read_source(needle_dir(), bad)


def test_a_turned_text_starts_at_another_line() -> None:
    source = Source("one\ntwo\nthree\n", {})
    turns = {source.rotate(seed).text for seed in range(30)}
    assert turns == {"one\ntwo\nthree\n", "two\nthree\none\n", "three\none\ntwo\n"}
    assert source.rotate(3) == source.rotate(3)
