"""Variable tracking: a value assigned to one variable and handed on from variable to variable, among noise."""

from __future__ import annotations

import random
import string
from itertools import pairwise

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


def variable_tracking(length: int) -> Generator:
    """Return a maker of samples for contexts of `length` tokens; their size is in noise sentences.

    One example with shorter names and its answer comes first.
    """

    def make(size: int, rng: random.Random) -> Sample:
        example = _one(min(_EXAMPLE_NOISES, length // 256), 3, rng)
        wanted = _one(size, 5, rng)
        shown = f"{example.input}{example.answer_prefix} {' '.join(example.outputs)}\n\n\n\n"
        return Sample(shown + wanted.input, wanted.answer_prefix, wanted.outputs)

    return Generator(1, make)


def _one(num_noises: int, letters: int, rng: random.Random) -> Sample:
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    order, value = tuple(names), str(rng.randint(10_000, 99_999))
    chain = [f"VAR {order[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old}" for old, new in pairwise(order)]
    lines = [NOISE] * num_noises
    room = range(num_noises + 1)
    is_long = len(room) >= len(chain)
    places = sorted(rng.sample(room, len(chain)) if is_long else rng.choices(room, k=len(chain)), reverse=True)
    for place, line in zip(places, reversed(chain), strict=True):
        lines.insert(place, line)
    prefix = _PREFIX.format(count=len(order), value=value)
    return Sample(_TASK.format(context="\n".join(lines), value=value), prefix, order)
