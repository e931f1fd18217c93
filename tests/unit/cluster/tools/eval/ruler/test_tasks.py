"""Samples that fit a number of tokens, for every task."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.tools.eval.ruler.sample import Material, Sample
from cluster.tools.eval.ruler.tasks import TASKS, find_tasks, make_sample
from protos.errors import UserError

Count = Callable[[Sample], int]
UNIT = {"niah_multikey_3": 130, "qa_synthetic": 90, "cwe": 35}  # tokens of a unit, where above 45


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1021, 4096])
def test_samples_fill_their_length(name: str, length: int, material: Material, count: Count) -> None:
    task = TASKS[name]
    for index in range(3):
        sample, used = make_sample(task, material, length, 7, index, count)
        assert used == count(sample)
        left = length - task.max_tokens - used
        assert 0 <= left <= UNIT.get(name, 45)
        assert len(sample.outputs) == len(set(sample.outputs))
        asked = sample.input.rpartition("\n")[2]
        assert all(output in sample.input and output not in asked for output in sample.outputs)


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_seed_and_index_alone(name: str, material: Material, count: Count) -> None:
    def make(seed: int, index: int) -> Sample:
        return make_sample(TASKS[name], material, 1024, seed, index, count)[0]

    first = make(0, 0)
    assert make(0, 0) == first
    assert len({first.input, make(0, 1).input, make(1, 0).input}) == 3


@pytest.mark.parametrize("tokens_a_word", [1, 3])
def test_any_tokenizer_will_do(material: Material, tokens_a_word: int) -> None:
    sample, used = make_sample(
        TASKS["niah_single_2"], material, 3000, 0, 0, lambda made: tokens_a_word * len(made.input.split())
    )
    assert 3000 - 128 - 8 <= used <= 3000 - 128
    assert used == tokens_a_word * len(sample.input.split())


def test_more_tokens_for_answers_leave_fewer_for_prompts(material: Material, count: Count) -> None:
    _, used = make_sample(TASKS["niah_single_2"], material, 1024, 0, 0, count, max_tokens=512)
    assert 512 - 8 <= used <= 512


def test_a_length_below_the_smallest_sample_is_refused(material: Material, count: Count) -> None:
    with pytest.raises(UserError, match=r"--lengths: 100: vt needs at least \d+ tokens here, answer included"):
        make_sample(TASKS["vt"], material, 100, 0, 0, count)


def test_published_answer_lengths() -> None:
    assert {name: task.max_tokens for name, task in TASKS.items() if not name.startswith("niah")} == {
        "vt": 30, "cwe": 120, "fwe": 50, "qa_synthetic": 32,
    }  # fmt: skip
    assert {task.max_tokens for name, task in TASKS.items() if name.startswith("niah")} == {128}
    assert [name for name, task in TASKS.items() if task.match == "any"] == ["qa_synthetic"]
    assert len(TASKS) == 12


@pytest.mark.parametrize("names", [[], ["vt", "vt"], ["niah"]])
def test_unknown_tasks(names: list[str]) -> None:
    with pytest.raises(UserError, match=r"--tasks: .*must be different names among niah_single_1, "):
        find_tasks(names)
    assert [task.name for task in find_tasks(["vt", "cwe"])] == ["vt", "cwe"]
