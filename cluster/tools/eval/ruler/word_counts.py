"""Common and frequent words: which words of a list, or of a coded text, appear most often."""

from __future__ import annotations

import math
import random
import string

from cluster.tools.eval.ruler.sample import Generator, Material, Sample

COMMON = 10  # words that appear often
_LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
_LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_LONG = 4096  # from this length on words are repeated as in the published task
_CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
ALPHA = 2.0  # exponent of Zeta's distribution
_CODED_LETTERS = 6
_TOKENS_PER_CODED_WORD = 50  # of the context, for the number of different words


def common_words(material: Material, length: int) -> Generator:
    """Return a maker of numbered lists; their size is in different words.

    Ten words appear 30 times, the others 3 times (6 and 1 in contexts below 4,096 tokens). An example with its answer
    comes first. The common words are adjectives and nouns; where a list needs more words than there are, coded ones
    are added.
    """
    repeats, example = ((30, 3), (40, 10, 3)) if length >= _LONG else ((6, 1), (20, 3, 1))

    def make(size: int, rng: random.Random) -> tuple[Sample, ...]:
        shown, shown_answer = _numbered(material, *example, rng)
        listed, answer = _numbered(material, size, *repeats, rng)
        numbered = " ".join(f"{number}. {word}" for number, word in enumerate(shown_answer, 1))
        before = f"{_LIST.format(context=shown)}{_LIST_PREFIX} {numbered}\n"
        return (Sample(before + _LIST.format(context=listed), _LIST_PREFIX, answer),)

    return Generator(COMMON + 1, make)


def _numbered(
    material: Material, num_words: int, often: int, seldom: int, rng: random.Random
) -> tuple[str, tuple[str, ...]]:
    """Return a shuffled numbered list of `num_words` different words, and the common ones among them."""
    named = rng.sample(material.listed[: material.common], min(num_words, material.common))
    common, rest = named[:COMMON], named[COMMON:]
    missing = num_words - len(named)
    rest += rng.sample(material.listed[material.common :], min(missing, len(material.listed) - material.common))
    rest += _coded_words(num_words - COMMON - len(rest), rng)
    words = common * often + rest * seldom
    rng.shuffle(words)
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1)), tuple(common)


def frequent_words(length: int) -> Generator:
    """Return a maker of coded texts; their size is the number of words that Zeta's distribution is scaled to.

    The k-th of length/50 coded words appears `size / (k^2 zeta(2))` times, rounded down; the first is dots that are
    noise, and the next three are asked for.
    """
    num_words = max(COMMON, length // _TOKENS_PER_CODED_WORD)

    def make(size: int, rng: random.Random) -> tuple[Sample, ...]:
        words = ["...", *_coded_words(num_words - 1, rng)]
        text = [word for rank, word in enumerate(words, 1) for _ in range(int(size * rank**-ALPHA / _ZETA))]
        rng.shuffle(text)
        return (Sample(_CODED.format(context=" ".join(text)), _CODED_PREFIX, tuple(words[1:4])),)

    return Generator(30, make)  # the fourth rank appears at least once


_ZETA = math.pi**2 / 6  # zeta(ALPHA)


def _coded_words(count: int, rng: random.Random) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
    return list(words)
