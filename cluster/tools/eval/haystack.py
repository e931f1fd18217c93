"""Long documents with known answers: sentences with secret codes hidden in a book."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.text.prompts import PromptError, build_document_prompts, check_length
from cluster.text.reasoning import opens_reasoning
from cluster.text.tokenizer import TextTokenizer
from protos.errors import UserError
from protos.model.document_prompt import DEFAULT_DOCUMENT_PROMPT

_MIN_TOKENS_PER_NEEDLE = 64  # below this the document is hardly more than its needles
_LONG_LINE = 1000  # characters: a text with longer lines is cut between words


@dataclass(frozen=True, slots=True)
class Needle:
    """One hidden sentence (`answer`) and the question about it."""

    adjective: str
    noun: str
    code: str
    question: str
    answer: str
    depth: float  # where it starts, as a fraction of the document's characters


@dataclass(frozen=True, slots=True)
class Haystack:
    """A document with its needles in order of depth."""

    document: str
    needles: tuple[Needle, ...]
    num_tokens: int  # of the longest prompt about it


@dataclass(frozen=True, slots=True)
class Source:
    """Material of haystacks: a text to hide in, and the adjectives and nouns that codes are named by."""

    text: str
    words: Mapping[str, Sequence[str]]

    def rotate(self, seed: int) -> Source:
        """Return the same text from another line on, so that documents of different seeds begin differently."""
        at = self.text.find("\n", random.Random(f"{seed} start").randrange(len(self.text))) + 1
        return replace(self, text=self.text[at:] + self.text[:at])


@dataclass(frozen=True, slots=True)
class Form:
    """How questions become prompts.

    A prompt that is `begun` ends with the answer up to its code: the first digit is looked up in the last row of the
    prompt. Otherwise the model writes the whole answer, and looks the code up in rows that are decoded.
    """

    template: str = DEFAULT_DOCUMENT_PROMPT
    enable_thinking: bool | None = None
    begun: bool = False

    def prompts(
        self, tokenizer: TextTokenizer, document: str, needles: Sequence[Needle], max_model_len: int,
        max_tokens: int = 1,
    ) -> list[list[int]]:  # fmt: skip
        """Return one prompt a needle, the document first in all of them. Raises PromptError."""
        prompts = build_document_prompts(
            tokenizer, document, [needle.question for needle in needles], self.template,
            enable_thinking=self.enable_thinking, max_model_len=max_model_len, max_tokens=max_tokens,
        )  # fmt: skip
        if not self.begun:
            return prompts
        if any(opens_reasoning(tokenizer, prompt) for prompt in prompts):
            raise PromptError("chat_template: opens <think>, where an answer cannot be begun: use the answer form")
        for prompt, needle in zip(prompts, needles, strict=True):
            begin = needle.answer.removesuffix(f"{needle.code}.")
            ends_in_space = tokenizer.decode(prompt[-4:], skip_special=False)[-1:].isspace()
            prompt += tokenizer.encode(begin.lstrip() if ends_in_space else begin, continues=True)
            check_length(len(prompt), max_tokens, max_model_len)
        return prompts


_QUESTION = Form()


def read_source(assets: Path, document: Path | None = None) -> Source:
    """Return the words of `assets` with its book, or with the text of `document`. Raises UserError."""
    try:
        words = json.loads((assets / "words.json").read_bytes())
        book = "" if document else gzip.decompress((assets / "book.txt.gz").read_bytes()).decode("utf-8")
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{assets}: book.txt.gz or words.json unusable ({error}): reinstall longreach") from error
    if document is not None:
        try:
            book = document.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{document}: cannot be read as UTF-8 text ({error})") from error
        if not book.strip():
            raise UserError(f"{document}: has no text to hide anything in")
    return Source(book.strip("\n") + "\n", words)


def build_haystack(
    tokenizer: TextTokenizer, total_tokens: int, num_needles: int, seed: int, source: Source | Path, *,
    share_words: bool = False, form: Form = _QUESTION,
) -> Haystack:  # fmt: skip
    """Return a document: `num_needles` sentences hidden evenly in as much text as fits prompts of `total_tokens`.

    Args:
        source: the text, which starts again beyond its end; or the folder with the book and the words.
        share_words: half of the needles share their adjective or their noun with another; otherwise every word is used
            once. No two needles have both in common.
        form: of the prompts; by default a question with the default template.

    Raises:
        UserError: for sizes that cannot be.
    """
    source = read_source(source) if isinstance(source, Path) else source
    pairs = _choose_words(source.words, num_needles, seed, share_words)
    if total_tokens < (minimum := _MIN_TOKENS_PER_NEEDLE * (num_needles + 1)):
        raise UserError(f"total_tokens: {total_tokens}: must be at least {minimum} for {num_needles} needles")
    codes = random.Random(f"{seed} codes").sample(range(10_000, 100_000), num_needles)
    needles = [
        Needle(
            adjective, noun, str(code), f"What is the secret code of {adjective} {noun}?",
            f" The secret code of {adjective} {noun} is {code}.", 0.0,
        )
        for (adjective, noun), code in zip(pairs, codes, strict=True)
    ]  # fmt: skip
    facts = [needle.answer[1:] for needle in needles]
    empty = [len(prompt) for prompt in form.prompts(tokenizer, ".", needles, 2 * total_tokens)]
    longest = needles[empty.index(max(empty))]
    overhead = max(empty) + sum(len(tokenizer.encode(f"\n{fact}\n")) for fact in facts)
    budget = total_tokens - overhead
    while budget > 0:
        document = _hide(_cut(tokenizer, source.text, budget), facts)
        (prompt,) = form.prompts(tokenizer, document, [longest], 2 * total_tokens)
        if len(prompt) <= total_tokens:
            starts = [document.index(f"\n{fact}\n") + 1 for fact in facts]
            placed = [replace(needle, depth=at / len(document)) for needle, at in zip(needles, starts, strict=True)]
            return Haystack(document, tuple(placed), len(prompt))
        budget -= len(prompt) - total_tokens  # seams between book and needles cost a token here and there
    raise UserError(f"total_tokens: {total_tokens}: the needles and the question alone have {overhead}: raise it")


def is_right(answer_text: str, needle: Needle, begun: bool = False) -> bool:
    """Return whether the answer is exactly the hidden sentence, or its code if the prompt has `begun` the answer."""
    return answer_text.strip() == (f"{needle.code}." if begun else needle.answer.strip())


def finds_code(answer_text: str, needle: Needle) -> bool:
    """Return whether the first number of five digits in the answer is the code; what surrounds it is free."""
    number = re.search(r"(?<![0-9])[0-9]{5}(?![0-9])", answer_text)
    return number is not None and number[0] == needle.code


def _choose_words(
    words: Mapping[str, Sequence[str]], num_needles: int, seed: int, share_words: bool
) -> list[tuple[str, str]]:
    adjectives = sorted(words["adjectives"])
    nouns = sorted(set(words["nouns"]) - set(adjectives))  # "copper" is both
    max_needles = min(len(adjectives), len(nouns))
    if not 1 <= num_needles <= max_needles:
        raise UserError(f"num_needles: {num_needles}: must be between 1 and {max_needles}")
    draw = random.Random(f"{seed} words")
    firsts, seconds = draw.sample(adjectives, num_needles), draw.sample(nouns, num_needles)
    pairs = list(zip(firsts, seconds, strict=True))
    if not share_words or num_needles < 2:
        return pairs
    sharing = max(2, num_needles // 2)
    for index in range(1, sharing):  # neighbours in twos; an odd one joins the two before it
        if index % 2 or index == sharing - 1:
            other = pairs[index - 1]
            shares_first = draw.random() < 0.5
            pairs[index] = (other[0], seconds[index]) if shares_first else (firsts[index], other[1])
    draw.shuffle(pairs)
    return pairs


def _cut(tokenizer: TextTokenizer, book: str, num_tokens: int) -> str:
    """Return the longest run of whole lines (of words where lines are long) from the start within `num_tokens`.

    It is cut by characters first: 32K tokens do not need the tokens of all 4 MB.
    """
    size = 5 * num_tokens  # English has about 4 characters a token
    while True:
        text = (book * (size // len(book) + 1))[:size]
        ids = tokenizer.encode(text)
        if len(ids) > num_tokens:
            head = tokenizer.decode(ids[:num_tokens])
            return text[: _break_before(text, len(head), _LONG_LINE)]
        size *= 2


def _hide(text: str, facts: list[str]) -> str:
    """Put every fact on a line of its own near the middle of its equal part of the text."""
    pieces = []
    done = 0
    for index, fact in enumerate(facts):
        middle = len(text) * (2 * index + 1) // (2 * len(facts))
        at = max(done, _break_before(text, middle, len(text) // (4 * len(facts))) - 1)
        pieces += [text[done:at], f"\n{fact}\n"]
        done = at + 1 if text[at : at + 1] == "\n" else at  # the line break before the fact replaces the book's
    return "".join([*pieces, text[done:]])


def _break_before(text: str, stop: int, reach: int) -> int:
    """Return where the last line before `stop` ends, or else the last word, at most `reach` characters back."""
    low = max(0, stop - reach)
    for mark in ("\n", " "):
        at = text.rfind(mark, low, stop)
        if at >= 0:
            return at + 1
    return stop
