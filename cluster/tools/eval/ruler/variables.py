"""Variable tracking: a value assigned to one variable and handed on from variable to variable, among noise."""

from __future__ import annotations

import random
import string
from dataclasses import replace
from itertools import islice, pairwise
from operator import itemgetter

from cluster.tools.eval.ruler.sample import NOISE, Generator, Sample

HOPS = 4
_EXAMPLE_NOISES = 10  # sentences of the example before the question; fewer where the whole is short
_TASK = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {value} in the text above."
)
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned "
    "the value {value}, they are: "
)


def variable_tracking(length: int, questions: int = 1) -> Generator:
    """Return a maker of samples for contexts of `length` tokens; their size is in noise sentences.

    One example with shorter names and its answer comes first. Every question has a chain of its own in the context.
    """

    def make(size: int, rng: random.Random) -> tuple[Sample, ...]:
        (example,) = _chains(min(_EXAMPLE_NOISES, length // 256), 3, 1, rng)
        shown = f"{example.input}{example.answer_prefix} {' '.join(example.outputs)}\n\n\n\n"
        return tuple(replace(wanted, input=shown + wanted.input) for wanted in _chains(size, 5, questions, rng))

    return Generator(1, make)


def _chains(num_noises: int, letters: int, count: int, rng: random.Random) -> tuple[Sample, ...]:
    """Return a question about each of `count` chains in one context. Names and values are all different."""
    names: dict[str, None] = {}
    while len(names) < count * (HOPS + 1):
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    values: dict[str, None] = {}
    while len(values) < count:
        values[str(rng.randint(10_000, 99_999))] = None
    each = iter(names)
    chains = {value: tuple(islice(each, HOPS + 1)) for value in values}
    room = range(num_noises + 1)
    placed: list[tuple[int, str]] = []  # noise sentences before an assignment
    for value, chain in chains.items():
        lines = [f"VAR {chain[0]} = {value}", *(f"VAR {new} = VAR {old}" for old, new in pairwise(chain))]
        is_long = len(room) >= len(lines)
        places = sorted(rng.sample(room, len(lines)) if is_long else rng.choices(room, k=len(lines)))
        placed += zip(places, lines, strict=True)
    text = [NOISE] * num_noises
    placed.sort(key=itemgetter(0))
    for place, line in reversed(placed):
        text.insert(place, line)
    context = "\n".join(text)
    return tuple(
        Sample(_TASK.format(context=context, value=value), _PREFIX.format(count=len(chain), value=value), chain)
        for value, chain in chains.items()
    )
