"""The tasks by name, and samples of them that fit a number of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cluster.common.units import format_count
from cluster.tools.eval.ruler.needles import NeedleTask, needle_generator
from cluster.tools.eval.ruler.sample import Generator, Material, Sample
from cluster.tools.eval.ruler.two_hop import two_hop_questions
from cluster.tools.eval.ruler.variables import variable_tracking
from cluster.tools.eval.ruler.word_counts import common_words, frequent_words
from protos.errors import UserError

_NEAR = 8  # tokens below the budget that are not worth another sample
_MAX_TRIES = 48


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its samples, the tokens of an answer, and which outputs an answer must have.

    Args:
        hidden: the needles, or what returns a maker of samples for the length of a context and a number of questions.
        asks_once: whether a haystack has one question only.
    """

    name: str
    max_tokens: int
    hidden: NeedleTask | Callable[[Material, int, int], Generator]
    match: Literal["all", "any"] = "all"
    asks_once: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("niah_single_1", 128, NeedleTask("noise")),
        Task("niah_single_2", 128, NeedleTask("text")),
        Task("niah_single_3", 128, NeedleTask("text", value_kind="uuids")),
        Task("niah_multikey_1", 128, NeedleTask("text", keys=4)),
        Task("niah_multikey_2", 128, NeedleTask("needles")),
        Task("niah_multikey_3", 128, NeedleTask("needles", key_kind="uuids", value_kind="uuids")),
        Task("niah_multivalue", 128, NeedleTask("text", values=4)),
        Task("niah_multiquery", 128, NeedleTask("text", keys=4, queries=4)),
        Task("vt", 30, lambda material, length, questions: variable_tracking(length, questions)),
        Task("cwe", 120, lambda material, length, questions: common_words(material, length), asks_once=True),
        Task("fwe", 50, lambda material, length, questions: frequent_words(length), asks_once=True),
        Task("qa_synthetic", 32, lambda material, length, questions: two_hop_questions(questions), match="any"),
    )
}


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """Tasks that are asked about one haystack, each `questions` times; several of them are needle tasks alike."""

    tasks: tuple[Task, ...]
    questions: int = 1

    @property
    def name(self) -> str:
        """The names of the tasks with a plus sign."""
        return "+".join(task.name for task in self.tasks)

    @property
    def max_tokens(self) -> int:
        """The tokens of an answer."""
        return max(task.max_tokens for task in self.tasks)

    @property
    def asked(self) -> tuple[Task, ...]:
        """The task of each sample of a haystack."""
        return tuple(task for task in self.tasks for _ in range(self.questions))

    def generator(self, material: Material, length: int) -> Generator:
        """Return a maker of all samples of a haystack, in the order of `asked`."""
        needles = [task.hidden for task in self.tasks if isinstance(task.hidden, NeedleTask)]
        if needles:
            return needle_generator(needles, self.questions, material)
        (task,) = self.tasks
        assert not isinstance(task.hidden, NeedleTask)
        return task.hidden(material, length, self.questions)


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names. Raises UserError."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names or len(set(names)) < len(names):
        given = ",".join(unknown or names)
        raise UserError(f"--tasks: {given}: must be different names among {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


def group_tasks(tasks: Sequence[Task], questions: int) -> list[TaskGroup]:
    """Return the tasks in groups that share haystacks; each alone where a haystack has one question.

    Raises UserError: a task cannot ask so many questions.
    """
    if questions == 1:
        return [TaskGroup((task,)) for task in tasks]
    if once := [task.name for task in tasks if task.asks_once]:
        problem = f"{', '.join(once)}: one question a text is all there is"
        raise UserError(f"--questions: {questions}: {problem}: leave it out of --tasks")
    groups: dict[object, list[Task]] = {}
    for task in tasks:
        groups.setdefault(task.hidden.shared if isinstance(task.hidden, NeedleTask) else task.name, []).append(task)
    return [TaskGroup(tuple(group), questions) for group in groups.values()]


def make_samples(
    group: TaskGroup, material: Material, length: int, seed: int, index: int, count: Callable[[Sample], int],
    max_tokens: int | None = None,
) -> tuple[tuple[Sample, ...], int]:  # fmt: skip
    """Return the samples of haystack `index`, and the tokens of the longest prompt: the largest that fits `length`.

    At most a unit of the task (a noise sentence, a word, a distractor) or 8 tokens are left over beside the answer.

    Args:
        count: returns the tokens of a sample's prompt, answer prefix included.
        max_tokens: of the answer, in place of the tasks' own.

    Raises:
        UserError: the smallest haystack is too long.
    """
    generator, budget = group.generator(material, length), _budget(group, length, max_tokens)

    def make(size: int) -> tuple[tuple[Sample, ...], int]:
        samples = generator.make(size, random.Random(f"{group.name} {length} {seed} {index}"))
        return samples, count(_longest(samples, count))

    low, high = generator.smallest, 0  # fits; does not, 0 while unknown
    found, used = make(low)
    _check(group, length, budget, used)
    slope, origin = 0.0, (low, used)
    for _ in range(_MAX_TRIES):
        room = budget - used
        if high - low == 1 or (slope and room < min(slope, _NEAR)):
            break
        size = low + max(1, int(room / slope)) if slope else 2 * low + 8
        size = min(size, high - 1) if high else size
        samples, tokens = make(size)
        if size > origin[0]:
            slope = max(1e-3, (tokens - origin[1]) / (size - origin[0]))
        if tokens <= budget:
            low, found, used = size, samples, tokens
        else:
            high = size
    return found, used


def check_fits(
    group: TaskGroup, material: Material, length: int, count: Callable[[Sample], int], max_tokens: int | None = None
) -> None:
    """Raise UserError where the smallest haystack of tasks is too long; arguments as of `make_samples`."""
    generator = group.generator(material, length)
    samples = generator.make(generator.smallest, random.Random(group.name))
    _check(group, length, _budget(group, length, max_tokens), count(_longest(samples, count)))


def _longest(samples: Sequence[Sample], count: Callable[[Sample], int]) -> Sample:
    """Return the sample with most tokens in its last line: the others are equal."""
    return max(samples, key=lambda sample: count(replace(sample, input=sample.input.rpartition("\n")[2])))


def _budget(group: TaskGroup, length: int, max_tokens: int | None) -> int:
    return length - (group.max_tokens if max_tokens is None else max_tokens)


def _check(group: TaskGroup, length: int, budget: int, used: int) -> None:
    if used > budget:
        raise UserError(
            f"--lengths: {format_count(length)}: {group.name} needs at least {used + length - budget} tokens here, "
            "answer included: raise it or leave the task out of --tasks"
        )
