"""The eight needle tasks: one or several keys, values and queries in noise, in a text, or among other needles."""

from __future__ import annotations

import random
import uuid
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

    def generator(self, material: Material) -> Generator:
        """Return a maker of samples; their size is in noise sentences, words of the text, or distractors."""
        return Generator(self.keys * self.values, lambda size, rng: self._make(material, size, rng))

    def _make(self, material: Material, size: int, rng: random.Random) -> Sample:
        values: dict[str, list[str]] = {}
        while len(values) < self.keys:
            values.setdefault(self._key(material, rng), [self._value(rng) for _ in range(self.values)])
        asked = rng.sample(list(values), self.queries)
        needles = [self._needle(key, value) for key, each in values.items() for value in each]
        rng.shuffle(needles)
        context = self._hide(needles, material, size, rng, taken=set(values))
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        is_one = self.queries * self.values == 1
        kind = self.value_kind.removesuffix("s") if is_one else self.value_kind
        return Sample(
            (_ONE if is_one else _SEVERAL).format(kind=kind, context=context, query=query),
            _PREFIX.format(kind=kind, query=query, verb="is" if is_one else "are"),
            tuple(value for key in asked for value in values[key]),
        )

    def _hide(self, needles: list[str], material: Material, size: int, rng: random.Random, taken: set[str]) -> str:
        if self.haystack == "text":
            at = sorted(rng.sample(DEPTHS, len(needles)))
            sentences = material.passage(size, rng)
            for depth, needle in reversed([*zip(at, needles, strict=True)]):
                sentences.insert(len(sentences) * depth // 100, needle)
            return " ".join(sentences)
        if self.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [self._needle(self._other_key(material, rng, taken), self._value(rng)) for _ in range(size)]
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _other_key(self, material: Material, rng: random.Random, taken: set[str]) -> str:
        while (key := self._key(material, rng)) in taken:
            pass
        return key

    def _key(self, material: Material, rng: random.Random) -> str:
        return material.draw_key(rng) if self.key_kind == "words" else _uuid(rng)

    def _value(self, rng: random.Random) -> str:
        return str(rng.randint(1_000_000, 9_999_999)) if self.value_kind == "numbers" else _uuid(rng)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
