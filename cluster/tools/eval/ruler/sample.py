"""One sample of a task, and the material that samples are made of."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cluster.tools.assets import needle_dir
from cluster.tools.eval.haystack import read_source

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NOT_RULER = "not RULER's own samples"  # what is said of several questions about one haystack


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt (`input`, and the `answer_prefix` that the answer continues) with the strings an answer must have."""

    input: str
    answer_prefix: str
    outputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Generator:
    """Makes the samples of one haystack of any size (sentences, words or distractors, as the task counts).

    They differ in their last lines, the questions, and in what follows. The same size and random state give the same
    samples.
    """

    smallest: int  # size
    make: Callable[[int, random.Random], tuple[Sample, ...]]


@dataclass(frozen=True, slots=True)
class Material:
    """Words of keys, a text to hide needles in (as words), and the distinct words of lists."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    book: tuple[str, ...]
    listed: tuple[str, ...]  # adjectives and nouns first

    @property
    def common(self) -> int:
        """How many of the listed words may be the common ones."""
        return len(set(self.adjectives) | set(self.nouns))

    def draw_key(self, rng: random.Random) -> str:
        """Return an adjective and a noun with a hyphen."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"

    def passage(self, num_words: int, rng: random.Random) -> list[str]:
        """Return the sentences of `num_words` words from a random place on; the text starts again where it ends."""
        start, words = rng.randrange(len(self.book)), self.book
        end = start + num_words
        taken = [*words[start:end]]
        while len(taken) < num_words:
            taken += words[: num_words - len(taken)]
        return re.split(r"(?<=[.?!:]) ", " ".join(taken)) if taken else []


@lru_cache(maxsize=2)
def read_material(document: Path | None = None) -> Material:
    """Return the material: the King James Bible, or the text of `document`. Raises UserError."""
    source = read_source(needle_dir(), document)
    adjectives, nouns = tuple(sorted(source.words["adjectives"])), tuple(sorted(source.words["nouns"]))
    first = sorted({*adjectives, *nouns})
    others = sorted(set(re.findall(r"\b[a-z]{3,}\b", source.text)).difference(first))
    return Material(adjectives, nouns, tuple(source.text.split()), (*first, *others))
