"""The eight needle tasks: one or several keys, values and queries in noise, in a text, or among other needles."""

from __future__ import annotations

import random
import uuid
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.tools.eval.ruler.sample import NOISE, Generator, Material, Sample

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
)
_SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?"
)
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text {verb}"
DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # percent of a text's sentences


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """What is hidden: `keys` keys of `values` values each; `queries` of the keys are asked for."""

    haystack: Literal["noise", "text", "needles"]
    keys: int = 1
    values: int = 1
    queries: int = 1
    key_kind: Literal["words", "uuids"] = "words"
    value_kind: Literal["numbers", "uuids"] = "numbers"

    @property
    def is_one(self) -> bool:
        """Whether a single value is asked for, which prompts announce in the singular."""
        return self.queries * self.values == 1

    @property
    def shared(self) -> tuple[str, ...]:
        """What tasks must have in common to be asked about one haystack: its kind, and all that is said before it."""
        return self.haystack, self.key_kind, self.value_kind, str(self.is_one)

    def draw(self, values: dict[str, list[str]], material: Material, rng: random.Random) -> list[str]:
        """Add the keys of a question with their values, all different, and return the keys it asks for."""
        keys: list[str] = []
        while len(keys) < self.keys:
            key, drawn = self._key(material, rng), [self._value(rng) for _ in range(self.values)]
            others = {value for each in values.values() for value in each}
            if key not in values and len(others.union(drawn)) == len(others) + self.values:
                values[key] = drawn
                keys.append(key)
        return rng.sample(keys, self.queries)

    def ask(self, context: str, asked: Sequence[str], values: dict[str, list[str]]) -> Sample:
        """Return the question for the values of some keys about a context."""
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        kind = self.value_kind.removesuffix("s") if self.is_one else self.value_kind
        return Sample(
            (_ONE if self.is_one else _SEVERAL).format(kind=kind, context=context, query=query),
            _PREFIX.format(kind=kind, query=query, verb="is" if self.is_one else "are"),
            tuple(value for key in asked for value in values[key]),
        )

    def hide(self, values: dict[str, list[str]], material: Material, size: int, rng: random.Random) -> str:
        """Return a context of a size with a needle for every value of every key."""
        needles = [self._needle(key, value) for key, each in values.items() for value in each]
        rng.shuffle(needles)
        if self.haystack == "text":
            at = sorted(rng.sample(DEPTHS * -(-len(needles) // len(DEPTHS)), len(needles)))
            sentences = material.passage(size, rng)
            for depth, needle in reversed([*zip(at, needles, strict=True)]):
                sentences.insert(len(sentences) * depth // 100, needle)
            return " ".join(sentences)
        if self.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [self._needle(self._other_key(material, rng, values), self._value(rng)) for _ in range(size)]
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _other_key(self, material: Material, rng: random.Random, taken: Container[str]) -> str:
        while (key := self._key(material, rng)) in taken:
            pass
        return key

    def _key(self, material: Material, rng: random.Random) -> str:
        return material.draw_key(rng) if self.key_kind == "words" else _uuid(rng)

    def _value(self, rng: random.Random) -> str:
        return str(rng.randint(1_000_000, 9_999_999)) if self.value_kind == "numbers" else _uuid(rng)


def needle_generator(tasks: Sequence[NeedleTask], questions: int, material: Material) -> Generator:
    """Return a maker of `questions` samples of each task about one haystack; tasks are the same in `shared`.

    Its size is in noise sentences, words of the text, or distractors. The needles of all samples are hidden in it, so
    those of the others are distractors too.
    """

    def make(size: int, rng: random.Random) -> tuple[Sample, ...]:
        values: dict[str, list[str]] = {}
        asked = [(task, task.draw(values, material, rng)) for task in tasks for _ in range(questions)]
        context = tasks[0].hide(values, material, size, rng)
        return tuple(task.ask(context, keys, values) for task, keys in asked)

    return Generator(questions * sum(task.keys * task.values for task in tasks), make)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
