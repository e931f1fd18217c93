"""The needle tasks: what is hidden and where, what is asked, which outputs are wanted."""

from __future__ import annotations

import random
import re
import uuid
from collections import Counter

import pytest

from cluster.tools.eval.ruler.needles import DEPTHS, NeedleTask, needle_generator
from cluster.tools.eval.ruler.sample import NOISE, Material, Sample

HIDDEN = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)")


def sample(task: NeedleTask, material: Material, size: int = 50, seed: int = 0) -> Sample:
    (made,) = needle_generator([task], 1, material).make(size, random.Random(seed))
    return made


def test_one_key_in_noise_word_for_word(material: Material) -> None:
    made = sample(NeedleTask("noise"), material, size=2, seed=3)
    lines = made.input.split("\n")
    ((kind, key, value),) = HIDDEN.findall(made.input)
    assert kind == "numbers"
    assert lines[0] == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert sorted(lines[1:4]) == sorted([NOISE, NOISE, f"One of the special magic numbers for {key} is: {value}."])
    assert lines[4:] == [f"What is the special magic number for {key} mentioned in the provided text?"]
    assert made.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert made.outputs == (value,)
    assert re.fullmatch(r"[1-9][0-9]{6}", value)


@pytest.mark.parametrize(
    ("task", "hidden", "wanted"),
    [
        (NeedleTask("text"), 1, 1),
        (NeedleTask("text", keys=4), 4, 1),
        (NeedleTask("text", values=4), 4, 4),
        (NeedleTask("text", keys=4, queries=4), 4, 4),
        (NeedleTask("needles"), 51, 1),
        (NeedleTask("needles", key_kind="uuids", value_kind="uuids"), 51, 1),
    ],
)
def test_what_is_asked_is_hidden_once(task: NeedleTask, hidden: int, wanted: int, material: Material) -> None:
    for seed in range(20):
        made = sample(task, material, seed=seed)
        found = HIDDEN.findall(made.input)
        assert len(found) == hidden
        assert len(made.outputs) == wanted
        asked = re.findall(r"(?<=for )\S+ mentioned|\S+-\S+(?=,| mentioned)", made.input.rpartition("\n")[2])
        keys = [key.removesuffix(" mentioned") for key in asked]
        assert len(keys) == task.queries
        of_asked = [value for wanted_key in keys for _, key, value in found if key == wanted_key]
        assert sorted(of_asked) == sorted(made.outputs)
        assert len(set(of_asked)) == len(of_asked)


def test_several_are_asked_for_in_the_plural(material: Material) -> None:
    made = sample(NeedleTask("text", keys=4, queries=4), material)
    assert made.input.startswith("Some special magic numbers are hidden within")
    assert re.search(r"What are all the special magic numbers for (\S+, ){3}and \S+ mentioned", made.input)
    assert made.answer_prefix.endswith(" mentioned in the provided text are")


def test_uuids_are_version_4_and_lower_case(material: Material) -> None:
    (value,) = sample(NeedleTask("text", value_kind="uuids"), material).outputs
    assert uuid.UUID(value).version == 4
    assert value == value.lower()


def test_depths_are_spread_over_the_text(material: Material) -> None:
    """Over 400 samples needles stand in each quarter of the text about as often as in the others."""
    assert (len(DEPTHS), DEPTHS[0], DEPTHS[-1]) == (40, 0, 100)
    quarters: Counter[int] = Counter()
    for seed in range(400):
        made = sample(NeedleTask("text"), material, size=400, seed=seed)
        at = made.input.index("One of the special magic numbers for")
        quarters[min(3, 4 * at // len(made.input))] += 1
    assert all(60 <= quarters[quarter] <= 140 for quarter in range(4)), quarters


def test_distractors_never_have_the_key_that_is_asked(material: Material) -> None:
    few = Material(material.adjectives[:2], material.nouns[:2], material.book, material.listed)
    for seed in range(30):
        made = sample(NeedleTask("needles"), few, seed=seed)
        key = made.answer_prefix.split()[5]
        assert [value for _, name, value in HIDDEN.findall(made.input) if name == key] == list(made.outputs)


@pytest.mark.parametrize(
    ("tasks", "questions", "hidden"),
    [
        ([NeedleTask("text"), NeedleTask("text", keys=4)], 20, 100),  # more than there are depths
        ([NeedleTask("text", values=4), NeedleTask("text", keys=4, queries=4)], 3, 24),
        ([NeedleTask("noise")], 5, 5),
        ([NeedleTask("needles", key_kind="uuids", value_kind="uuids")], 5, 205),
    ],
)
def test_samples_of_one_haystack(tasks: list[NeedleTask], questions: int, hidden: int, material: Material) -> None:
    """The texts are equal up to the question; every wanted value stands there once, for a key of this sample alone."""
    samples = needle_generator(tasks, questions, material).make(200, random.Random(1))
    assert len(samples) == len(tasks) * questions
    assert len({made.input.rpartition("\n")[0] for made in samples}) == 1
    found = HIDDEN.findall(samples[0].input)
    assert len(found) == hidden
    values: dict[str, list[str]] = {}
    for _, key, value in found:
        values.setdefault(key, []).append(value)
    asked: list[str] = []
    for made in samples:
        keys = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)+", made.input.rpartition("\n")[2])
        assert sorted(value for key in keys for value in values[key]) == sorted(made.outputs)
        assert all(made.input.count(value) == 1 for value in made.outputs)
        asked += keys
    assert len(set(asked)) == len(asked) == questions * sum(task.queries for task in tasks)
    assert samples == needle_generator(tasks, questions, material).make(200, random.Random(1))
