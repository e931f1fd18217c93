"""Long documents with known answers: sentences with secret codes hidden in a book."""

from __future__ import annotations

import gzip
import json
import random
from dataclasses import dataclass
from pathlib import Path

from cluster.prompts import build_document_prompts
from cluster.tokenizer import TextTokenizer
from protos.errors import UserError

_MIN_TOKENS_PER_NEEDLE = 64  # below this the document is hardly more than its needles


@dataclass(frozen=True, slots=True)
class Needle:
    """One hidden sentence; `depth` is where it starts, as a fraction of the document's characters."""

    adjective: str
    noun: str
    code: str
    question: str
    answer: str
    depth: float


@dataclass(frozen=True, slots=True)
class Haystack:
    """A document with its needles in order of depth; `num_tokens` is the size of the longest prompt about it."""

    document: str
    needles: tuple[Needle, ...]
    num_tokens: int


def build_haystack(
    tokenizer: TextTokenizer,
    total_tokens: int,
    num_needles: int,
    seed: int,
    assets: Path,
    *,
    share_words: bool = False,
) -> Haystack:
    """Hide `num_needles` sentences evenly in as much of the book as fits prompts of `total_tokens`.

    The prompts are those of `build_document_prompts` with the default template. No two needles share an adjective
    or a noun unless `share_words`. Beyond its end the book starts again. Raises ValueError for sizes that cannot be.
    """
    book, words = _read_assets(assets)
    pairs = _choose_words(words, num_needles, seed, share_words)
    if total_tokens < _MIN_TOKENS_PER_NEEDLE * (num_needles + 1):
        raise UserError(
            f"total_tokens: {total_tokens}: must be at least {_MIN_TOKENS_PER_NEEDLE * (num_needles + 1)} "
            f"for {num_needles} needles"
        )
    codes = random.Random(f"{seed} codes").sample(range(10_000, 100_000), num_needles)
    facts = [_fact(adjective, noun, code) for (adjective, noun), code in zip(pairs, codes, strict=True)]
    questions = [_question(adjective, noun) for adjective, noun in pairs]
    empty = build_document_prompts(tokenizer, ".", questions, enable_thinking=None, max_model_len=total_tokens)
    overhead = max(map(len, empty)) + sum(len(tokenizer.encode(f"\n{fact}\n")) for fact in facts)
    budget = total_tokens - overhead
    while budget > 0:
        document, offsets = _hide(_cut(tokenizer, book, budget), facts)
        longest = max(questions, key=lambda question: len(tokenizer.encode(question)))
        (prompt,) = build_document_prompts(
            tokenizer, document, [longest], enable_thinking=None, max_model_len=2 * total_tokens
        )
        if len(prompt) <= total_tokens:
            needles = tuple(
                Needle(adjective, noun, str(code), question, f" {fact}", offset / len(document))
                for (adjective, noun), code, question, fact, offset in zip(
                    pairs, codes, questions, facts, offsets, strict=True
                )
            )
            return Haystack(document, needles, len(prompt))
        budget -= len(prompt) - total_tokens  # seams between book and needles cost a token here and there
    raise UserError(f"total_tokens: {total_tokens}: the needles and the question alone have {overhead}: raise it")


def is_right(answer_text: str, needle: Needle) -> bool:
    """Whether the answer is exactly the hidden sentence, white space around it aside."""
    return answer_text.strip() == needle.answer.strip()


def _fact(adjective: str, noun: str, code: int) -> str:
    return f"The secret code of {adjective} {noun} is {code}."


def _question(adjective: str, noun: str) -> str:
    return f"What is the secret code of {adjective} {noun}?"


def _read_assets(assets: Path) -> tuple[str, dict[str, list[str]]]:
    try:
        book = gzip.decompress((assets / "book.txt.gz").read_bytes()).decode("utf-8")
        words = json.loads((assets / "words.json").read_bytes())
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{assets}: book.txt.gz or words.json unusable ({error}): reinstall longreach") from error
    return book.strip("\n") + "\n", words


def _choose_words(
    words: dict[str, list[str]], num_needles: int, seed: int, share_words: bool
) -> list[tuple[str, str]]:
    adjectives = sorted(words["adjectives"])
    nouns = sorted(set(words["nouns"]) - set(adjectives))  # "copper" is both
    most = len(adjectives) * len(nouns) if share_words else min(len(adjectives), len(nouns))
    if not 1 <= num_needles <= most:
        hint = "" if share_words else ", or more if needles may share words"
        raise UserError(f"num_needles: {num_needles}: must be between 1 and {most}{hint}")
    draw = random.Random(f"{seed} words")
    if share_words:
        chosen = draw.sample(range(most), num_needles)
        return [(adjectives[index // len(nouns)], nouns[index % len(nouns)]) for index in chosen]
    return list(zip(draw.sample(adjectives, num_needles), draw.sample(nouns, num_needles), strict=True))


def _cut(tokenizer: TextTokenizer, book: str, num_tokens: int) -> str:
    """The longest run of whole lines from the start of the book within `num_tokens`.

    Cut by characters first: 32K tokens do not need the tokens of all 4 MB.
    """
    size = 5 * num_tokens  # English has about 4 characters a token
    while True:
        text = (book * (size // len(book) + 1))[:size]
        ids = tokenizer.encode(text)
        if len(ids) > num_tokens:
            head = tokenizer.decode(ids[:num_tokens])
            return text[: text.rfind("\n", 0, len(head)) + 1] or text[: len(head)]
        size *= 2


def _hide(text: str, facts: list[str]) -> tuple[str, list[int]]:
    """Put each fact on a line of its own, in the middle of its equal part of the text, and tell where it starts."""
    pieces, offsets = [], []
    done = length = 0
    for index, fact in enumerate(facts):
        middle = len(text) * (2 * index + 1) // (2 * len(facts))
        at = max(done, text.rfind("\n", 0, middle))
        pieces += [text[done:at], f"\n{fact}\n"]
        offsets.append(length + at - done + 1)
        length += at - done + len(pieces[-1])
        done = at + 1 if text[at : at + 1] == "\n" else at  # the line break before the fact replaces the book's
    return "".join([*pieces, text[done:]]), offsets
