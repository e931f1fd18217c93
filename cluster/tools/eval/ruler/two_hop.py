"""Questions over two facts in different passages, among passages alike: `qa_synthetic`, which is not a RULER task."""

from __future__ import annotations

import random

from cluster.tools.eval.ruler.sample import Generator, Sample

_TASK = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
_PREFIX = " Answer:"
_WORKS = (
    "{person} has been a {trade} at the house of {house} for many years.",
    "The house of {house} took on {person} as its {trade} last spring.",
    "Among those who earn their bread at the house of {house} is the {trade} {person}.",
)
_STANDS = (
    "The house of {house} stands by the river in {town}.",
    "Travellers who come to {town} pass the house of {house} first.",
    "In {town} everybody knows the way to the house of {house}.",
)
_TRADES = ("weaver", "baker", "clerk", "smith", "mason", "printer", "tailor", "carver")
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def two_hop_questions(questions: int = 1) -> Generator:
    """Return a maker of samples; their size is in pairs of passages.

    A pair says who works at which house, and where that house is. Every question is about another pair.
    """

    def make(size: int, rng: random.Random) -> tuple[Sample, ...]:
        names = _names(3 * size, rng)
        pairs = [*zip(names[:size], names[size : 2 * size], names[2 * size :], strict=True)]
        passages = []
        for person, house, town in pairs:
            passages.append(rng.choice(_WORKS).format(person=person, house=house, trade=rng.choice(_TRADES)))
            passages.append(rng.choice(_STANDS).format(house=house, town=town))
        rng.shuffle(passages)
        context = "\n\n".join(f"Document {number}:\n{passage}" for number, passage in enumerate(passages, 1))
        return tuple(
            Sample(_TASK.format(context=context, query=f"In which town does {person} work?"), _PREFIX, (town,))
            for person, _, town in rng.sample(pairs, questions)
        )

    return Generator(max(2, questions), make)


def _names(count: int, rng: random.Random) -> list[str]:
    """Return `count` different invented names of three syllables (343,000 there are)."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = [rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(3)]
        names["".join(syllables).capitalize()] = None
    return list(names)
