"""The question task: two passages lead to the answer, and no other does."""

from __future__ import annotations

import random
import re

import pytest

from cluster.tools.eval.ruler.two_hop import two_hop_questions


@pytest.mark.parametrize("size", [2, 3, 40, 1000])
def test_the_answer_takes_two_passages(size: int) -> None:
    (made,) = two_hop_questions().make(size, random.Random(size))
    passages = re.findall(r"^Document (\d+):\n(.+)$", made.input, re.MULTILINE)
    assert [int(number) for number, _ in passages] == list(range(1, 2 * size + 1))
    asked = re.search(r"Question: In which town does (\w+) work\?$", made.input)
    assert asked is not None
    (works,) = [text for _, text in passages if asked[1] in text]
    house = re.search(r"house of (\w+)", works)
    assert house is not None
    (stands,) = [text for _, text in passages if house[1] in text and text != works]
    (town,) = made.outputs
    assert town in stands
    assert town not in works
    assert sum(town in text for _, text in passages) == 1


def test_which_pair_is_asked_for_varies() -> None:
    assert len({two_hop_questions().make(5, random.Random(seed))[0].outputs for seed in range(10)}) == 10


def test_questions_of_one_haystack_are_about_different_pairs() -> None:
    generator = two_hop_questions(7)
    assert generator.smallest == 7
    samples = generator.make(9, random.Random(3))
    assert len({made.input.rpartition("\n")[0] for made in samples}) == 1
    assert len({made.input for made in samples}) == len({made.outputs for made in samples}) == 7
    assert all(made.input.count(f" {made.outputs[0]}") == 1 for made in samples)
