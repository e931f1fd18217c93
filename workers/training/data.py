"""Training documents: needles in book text, dense lists of codes, repeated random tokens.

A document is a list of token ids of an exact length, with the positions that count as answers. Templates are tokenised
once and joined as ids; joints fall where the tokenizer splits anyway (before a newline, before a space, after a code).
"""

from __future__ import annotations

import gzip
import json
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

CODE_DIGITS = 5
FIRST_DIGIT_WEIGHT = 5.0  # the lookup; the other digits merely continue it
SHARED_WORD = 0.3  # of the needles share their adjective or noun with another
REPEAT_TARGETS = 64  # scored positions of a repeated document, so that it does not drown the answers

Code = tuple[int, int, tuple[int, ...]]  # token ids of adjective, noun, digits


@dataclass(frozen=True)
class Corpus:
    """Token ids of the book, of the words codes are made of, and of the fixed pieces of needle and question."""

    book: np.ndarray
    adjectives: tuple[int, ...]
    nouns: tuple[int, ...]
    digits: tuple[int, ...]
    pieces: dict[str, tuple[int, ...]]
    vocab: int

    def statement(self, code: Code) -> list[int]:
        """Return ` The secret code of .. is .....` from the adjective on."""
        adjective, noun, digits = code
        return [adjective, noun, *self.pieces["is"], *digits, *self.pieces["stop"]]

    def needle(self, code: Code) -> list[int]:
        """Return the line that hides the code."""
        return [*self.pieces["needle"], *self.statement(code), *self.pieces["newline"]]

    def question(self, code: Code) -> list[int]:
        """Return the prompt that asks for the code."""
        return [*self.pieces["question"], code[0], code[1], *self.pieces["ask"]]

    def answer(self, code: Code) -> list[int]:
        """Return the continuation that the model has to learn."""
        return [*self.pieces["answer"], *self.statement(code), *self.pieces["end"]]


def load_corpus(assets: Path) -> Corpus:
    """Read tokenizer.json, words.json and book.txt.gz of `assets`. ValueError if a word or digit is not one token."""
    tokenizer = Tokenizer.from_file(str(assets / "tokenizer.json"))
    words = json.loads((assets / "words.json").read_text())

    def one(text: str) -> int:
        ids = tokenizer.encode(text).ids
        if len(ids) != 1:
            raise ValueError(f"words.json: {text!r} is {len(ids)} tokens in tokenizer.json; it must be one")
        return ids[0]

    pieces = {
        "needle": "\nThe secret code of",
        "question": "\nQuestion: What is the secret code of",
        "ask": "?\nAnswer:",
        "answer": " The secret code of",
        "is": " is ",
        "stop": ".",
        "newline": "\n",
        "end": "<|endoftext|>",
    }
    with gzip.open(assets / "book.txt.gz", "rt", encoding="utf-8") as stream:
        book = np.array(tokenizer.encode(stream.read()).ids, dtype=np.int32)
    return Corpus(
        book=book,
        adjectives=tuple(one(" " + word) for word in words["adjectives"]),
        nouns=tuple(one(" " + word) for word in words["nouns"]),
        digits=tuple(one(digit) for digit in "0123456789"),
        pieces={name: tuple(tokenizer.encode(text).ids) for name, text in pieces.items()},
        vocab=tokenizer.get_vocab_size(),
    )


@dataclass
class Document:
    """Token ids and the positions of tokens to be predicted: `answers` maps position to (weight, is a first digit)."""

    tokens: list[int] = field(default_factory=list)
    answers: dict[int, tuple[float, bool]] = field(default_factory=dict)

    def add(self, tokens: list[int], first_digit: int | None = None, scored: range = range(0)) -> None:
        """Append; `scored` (offsets in `tokens`) become answers, `first_digit` the offset of a code's first digit."""
        start = len(self.tokens)
        self.tokens.extend(tokens)
        for offset in scored:
            first = offset == first_digit
            self.answers[start + offset] = (FIRST_DIGIT_WEIGHT if first else 1.0, first)


class DocumentMaker:
    """Draws documents for one training step; the same generator state gives the same documents."""

    def __init__(self, corpus: Corpus, rng: np.random.Generator) -> None:
        self.corpus = corpus
        self.rng = rng
        code = (0, 0, (0,) * CODE_DIGITS)
        self.needle_tokens = len(corpus.needle(code))
        self.asked_tokens = len(corpus.question(code)) + len(corpus.answer(code))

    def draw(self, length: int, shortest: bool) -> Document:
        """Draw one document of `length` tokens; the mixture depends on whether this is the shortest length trained."""
        dense, repeated = (0.6, 0.2) if shortest else (0.075, 0.075)
        kind = self.rng.random()
        if kind < dense:
            return self.dense(length)
        if kind < dense + repeated:
            return self.repeated(length)
        fitting = length // (self.needle_tokens + self.asked_tokens)
        if shortest:
            needles = int(self.rng.integers(1, min(4, fitting), endpoint=True))
        else:
            needles = int(self.rng.integers(2, min(24, length // 64), endpoint=True))
        room = (length - needles * self.needle_tokens) // self.asked_tokens
        return self.haystack(length, needles, int(self.rng.integers(1, min(8, needles, room), endpoint=True)))

    def codes(self, count: int) -> list[Code]:
        """Draw `count` codes with different (adjective, noun); three in ten share a word with an earlier one."""
        found: dict[tuple[int, int], Code] = {}
        while len(found) < count:
            adjective, noun = int(self.rng.choice(self.corpus.adjectives)), int(self.rng.choice(self.corpus.nouns))
            if found and self.rng.random() < SHARED_WORD:
                sibling = list(found)[int(self.rng.integers(len(found)))]
                adjective, noun = (sibling[0], noun) if self.rng.random() < 0.5 else (adjective, sibling[1])
            digits = tuple(self.corpus.digits[d] for d in self.rng.integers(10, size=CODE_DIGITS))
            found.setdefault((adjective, noun), (adjective, noun, digits))
        return list(found.values())

    def haystack(self, length: int, needles: int, questions: int) -> Document:
        """Return book text with `needles` hidden in it, then `questions` of them asked and answered at the end."""
        codes = self.codes(needles)
        text = self._book(length - needles * self.needle_tokens - questions * self.asked_tokens)
        cuts = np.sort(self.rng.integers(len(text), size=needles, endpoint=True)).tolist()
        document = Document()
        for code, start, end in zip([*codes, None], [0, *cuts], [*cuts, len(text)], strict=True):
            document.add(text[start:end])
            if code:
                document.add(self.corpus.needle(code))
        for index in self.rng.permutation(needles)[:questions]:
            self._ask(document, codes[index])
        return document

    def dense(self, length: int) -> Document:
        """Return needle lines, then each restated in another order, or asked; book text fills the front."""
        asked = self.rng.random() < 0.5
        cost = self.needle_tokens + (self.asked_tokens if asked else self.needle_tokens)
        count = int(self.rng.integers(max(1, length // cost // 2), length // cost, endpoint=True))
        codes = self.codes(count)
        document = Document()
        document.add(self._book(length - count * cost))
        for code in codes:
            document.add(self.corpus.needle(code))
        for index in self.rng.permutation(count):
            if asked:
                self._ask(document, codes[index])
            else:
                first = len(self.corpus.pieces["needle"]) + 2 + len(self.corpus.pieces["is"])
                document.add(self.corpus.needle(codes[index]), first, range(first, first + CODE_DIGITS))
        return document

    def repeated(self, length: int) -> Document:
        """Return random tokens, then the same once more; some of the second half are answers."""
        half = length // 2
        tokens = self.rng.integers(1, self.corpus.vocab, size=length - half).tolist()
        document = Document()
        document.add(tokens)
        document.add(tokens[:half])
        for position in self.rng.permutation(half - 1)[:REPEAT_TARGETS].tolist():
            document.answers[length - half + 1 + position] = (1.0, False)
        return document

    def _ask(self, document: Document, code: Code) -> None:
        document.add(self.corpus.question(code))
        answer = self.corpus.answer(code)
        first = len(self.corpus.pieces["answer"]) + 2 + len(self.corpus.pieces["is"])
        document.add(answer, first, range(len(answer)))

    def _book(self, length: int) -> list[int]:
        start = int(self.rng.integers(len(self.corpus.book) - length))
        return self.corpus.book[start : start + length].tolist()


@dataclass(frozen=True)
class Batch:
    """tokens [B, L]; `rows` (into B*L) predict `targets` with `weights`; `first` marks the first digits of codes."""

    tokens: Tensor
    rows: Tensor
    targets: Tensor
    weights: Tensor
    first: Tensor


def collate(documents: list[Document]) -> Batch:
    """Join documents of one length."""
    tokens = torch.tensor([document.tokens for document in documents])
    flat, length = tokens.flatten(), tokens.shape[1]
    answers = [(i * length + p, *answer) for i, d in enumerate(documents) for p, answer in d.answers.items()]
    positions = torch.tensor([a[0] for a in answers], dtype=torch.long)
    return Batch(
        tokens=tokens,
        rows=positions - 1,
        targets=flat[positions],
        weights=torch.tensor([a[1] for a in answers]),
        first=torch.tensor([a[2] for a in answers], dtype=torch.bool),
    )


class Curriculum:
    """Chooses the sequence length: the next one once enough first digits are right at the current one."""

    LENGTHS = (256, 512, 1024, 2048, 4096)
    THRESHOLDS = (0.95, 0.95, 0.96, 0.97)  # to leave each length but the last
    WINDOW = 30  # steps the accuracy is taken over
    LEAST_STEPS = 60

    def __init__(self, max_length: int) -> None:
        self.lengths = [length for length in self.LENGTHS if length <= max_length] or [max_length]
        self.stage = 0
        self.steps = 0
        self.recent: deque[tuple[int, int]] = deque(maxlen=self.WINDOW)

    @property
    def accuracy(self) -> float:
        """First-digit accuracy over the last WINDOW steps of the current length, 0 before the first."""
        return sum(right for right, _ in self.recent) / max(1, sum(total for _, total in self.recent))

    def pick(self, rng: np.random.Generator) -> int:
        """Return the length of the next step: the current one in 60 % of steps, else any shorter one."""
        if self.stage == 0 or rng.random() < 0.6:
            return self.lengths[self.stage]
        return self.lengths[int(rng.integers(self.stage))]

    def record(self, length: int, right: int, total: int) -> None:
        """Count a step of `length` with `right` of `total` first digits; moves to the next length when it is time."""
        self.steps += 1
        if length == self.lengths[self.stage]:
            self.recent.append((right, total))
        last = self.stage + 1 == len(self.lengths)
        full = len(self.recent) == self.WINDOW and self.steps >= self.LEAST_STEPS
        if not last and full and self.accuracy > self.THRESHOLDS[self.stage]:
            self.stage, self.steps = self.stage + 1, 0
            self.recent.clear()

    def state(self) -> dict[str, object]:
        """Return the state that `restore` takes, in plain types."""
        return {"stage": self.stage, "steps": self.steps, "recent": [list(pair) for pair in self.recent]}

    def restore(self, state: dict[str, object]) -> None:
        """Continue from `state`; a shorter max_length than before ends at its own last stage."""
        stage, steps, recent = state["stage"], state["steps"], state["recent"]
        assert isinstance(stage, int)
        assert isinstance(steps, int)
        assert isinstance(recent, list)
        self.stage, self.steps = min(stage, len(self.lengths) - 1), steps
        self.recent.clear()
        self.recent.extend((right, total) for right, total in recent)
