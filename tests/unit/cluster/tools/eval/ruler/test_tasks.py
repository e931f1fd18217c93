"""Samples that fit a number of tokens, for every task."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cluster.tools.eval.ruler.sample import Material, Sample
from cluster.tools.eval.ruler.tasks import TASKS, TaskGroup, find_tasks, group_tasks, make_samples
from protos.errors import UserError

Count = Callable[[Sample], int]
TEXTS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
UNIT = {"niah_multikey_3": 130, "qa_synthetic": 90, "cwe": 35}  # tokens of a unit, where above 45


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1021, 4096])
def test_samples_fill_their_length(name: str, length: int, material: Material, count: Count) -> None:
    task = TASKS[name]
    for index in range(3):
        (sample,), used = make_samples(TaskGroup((task,)), material, length, 7, index, count)
        assert used == count(sample)
        left = length - task.max_tokens - used
        assert 0 <= left <= UNIT.get(name, 45)
        assert len(sample.outputs) == len(set(sample.outputs))
        asked = sample.input.rpartition("\n")[2]
        assert all(output in sample.input and output not in asked for output in sample.outputs)


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_seed_and_index_alone(name: str, material: Material, count: Count) -> None:
    def make(seed: int, index: int) -> Sample:
        (made,), _ = make_samples(TaskGroup((TASKS[name],)), material, 1024, seed, index, count)
        return made

    first = make(0, 0)
    assert make(0, 0) == first
    assert len({first.input, make(0, 1).input, make(1, 0).input}) == 3


@pytest.mark.parametrize("tokens_a_word", [1, 3])
def test_any_tokenizer_will_do(material: Material, tokens_a_word: int) -> None:
    group = TaskGroup((TASKS["niah_single_2"],))
    (sample,), used = make_samples(group, material, 3000, 0, 0, lambda made: tokens_a_word * len(made.input.split()))
    assert 3000 - 128 - 8 <= used <= 3000 - 128
    assert used == tokens_a_word * len(sample.input.split())


def test_more_tokens_for_answers_leave_fewer_for_prompts(material: Material, count: Count) -> None:
    _, used = make_samples(TaskGroup((TASKS["niah_single_2"],)), material, 1024, 0, 0, count, max_tokens=512)
    assert 512 - 8 <= used <= 512


def test_a_length_below_the_smallest_sample_is_refused(material: Material, count: Count) -> None:
    with pytest.raises(UserError, match=r"--lengths: 100: vt needs at least \d+ tokens here, answer included"):
        make_samples(TaskGroup((TASKS["vt"],)), material, 100, 0, 0, count)


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


def test_tasks_with_equal_texts_before_their_questions_share_haystacks() -> None:
    tasks = find_tasks([name for name in TASKS if name not in ("cwe", "fwe")])
    assert [group.name for group in group_tasks(tasks, 2)] == [
        "niah_single_1", "niah_single_2+niah_multikey_1", "niah_single_3", "niah_multikey_2", "niah_multikey_3",
        "niah_multivalue+niah_multiquery", "vt", "qa_synthetic",
    ]  # fmt: skip
    assert [group.name for group in group_tasks(tasks, 1)] == [task.name for task in tasks]
    with pytest.raises(UserError, match=r"--questions: 2: cwe: one question a text is all there is: leave it out"):
        group_tasks([TASKS["vt"], TASKS["cwe"]], 2)


@pytest.mark.parametrize("names", [TEXTS[:2], TEXTS[2:], ("niah_single_1",), ("niah_multikey_3",), ("vt",)])
@pytest.mark.parametrize("length", [3001, 8192])
def test_haystacks_fill_their_length(names: tuple[str, ...], length: int, material: Material, count: Count) -> None:
    """The longest prompt fits with its answer, all of them begin alike, and the seed gives the same ones again."""
    group = TaskGroup(tuple(find_tasks(names)), 3)
    samples, used = make_samples(group, material, length, 7, 1, count)
    assert [task.name for task in group.asked] == [name for name in names for _ in range(3)]
    assert used == max(map(count, samples))
    assert 0 <= length - group.max_tokens - used <= UNIT.get(names[0], 45)
    assert len({sample.input.rpartition("\n")[0] for sample in samples}) == 1
    assert len({sample.input for sample in samples}) == len(samples)
    assert make_samples(group, material, length, 7, 1, count) == (samples, used)
    assert make_samples(group, material, length, 7, 2, count)[0][0].input != samples[0].input
