"""The tasks by name, and samples of them that fit a number of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.common.units import format_count
from cluster.tools.eval.ruler.needles import NeedleTask
from cluster.tools.eval.ruler.sample import Generator, Material, Sample
from cluster.tools.eval.ruler.two_hop import GENERATOR as TWO_HOP
from cluster.tools.eval.ruler.variables import variable_tracking
from cluster.tools.eval.ruler.word_counts import common_words, frequent_words
from protos.errors import UserError

_NEAR = 8  # tokens below the budget that are not worth another sample
_MAX_TRIES = 48


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its makers of samples by context length, the tokens of an answer, and which outputs it must have."""

    name: str
    max_tokens: int
    generator: Callable[[Material, int], Generator]
    match: Literal["all", "any"] = "all"


def _needle(name: str, task: NeedleTask) -> Task:
    return Task(name, 128, lambda material, length: task.generator(material))


TASKS = {
    task.name: task
    for task in (
        _needle("niah_single_1", NeedleTask("noise")),
        _needle("niah_single_2", NeedleTask("text")),
        _needle("niah_single_3", NeedleTask("text", value_kind="uuids")),
        _needle("niah_multikey_1", NeedleTask("text", keys=4)),
        _needle("niah_multikey_2", NeedleTask("needles")),
        _needle("niah_multikey_3", NeedleTask("needles", key_kind="uuids", value_kind="uuids")),
        _needle("niah_multivalue", NeedleTask("text", values=4)),
        _needle("niah_multiquery", NeedleTask("text", keys=4, queries=4)),
        Task("vt", 30, lambda material, length: variable_tracking(length)),
        Task("cwe", 120, common_words),
        Task("fwe", 50, lambda material, length: frequent_words(length)),
        Task("qa_synthetic", 32, lambda material, length: TWO_HOP, match="any"),
    )
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names. Raises UserError."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names or len(set(names)) < len(names):
        given = ",".join(unknown or names)
        raise UserError(f"--tasks: {given}: must be different names among {', '.join(TASKS)}")
    return [TASKS[name] for name in names]


def make_sample(
    task: Task, material: Material, length: int, seed: int, index: int, count: Callable[[Sample], int],
    max_tokens: int | None = None,
) -> tuple[Sample, int]:  # fmt: skip
    """Return sample `index` of a task and its prompt tokens: the largest that fits `length` with its answer.

    At most a unit of the task (a noise sentence, a word, a distractor) or 8 tokens are left over.

    Args:
        count: returns the tokens of a sample's prompt, answer prefix included.
        max_tokens: of the answer, in place of the task's own.

    Raises:
        UserError: the smallest sample is too long.
    """
    generator, budget = task.generator(material, length), _budget(task, length, max_tokens)

    def make(size: int) -> tuple[Sample, int]:
        sample = generator.make(size, random.Random(f"{task.name} {length} {seed} {index}"))
        return sample, count(sample)

    low, high = generator.smallest, 0  # fits; does not, 0 while unknown
    found, used = make(low)
    _check(task, length, budget, used)
    slope, origin = 0.0, (low, used)
    for _ in range(_MAX_TRIES):
        room = budget - used
        if high - low == 1 or (slope and room < min(slope, _NEAR)):
            break
        size = low + max(1, int(room / slope)) if slope else 2 * low + 8
        size = min(size, high - 1) if high else size
        sample, tokens = make(size)
        if size > origin[0]:
            slope = max(1e-3, (tokens - origin[1]) / (size - origin[0]))
        if tokens <= budget:
            low, found, used = size, sample, tokens
        else:
            high = size
    return found, used


def check_fits(
    task: Task, material: Material, length: int, count: Callable[[Sample], int], max_tokens: int | None = None
) -> None:
    """Raise UserError where the smallest sample of a task is too long; arguments as of `make_sample`."""
    generator = task.generator(material, length)
    sample = generator.make(generator.smallest, random.Random(task.name))
    _check(task, length, _budget(task, length, max_tokens), count(sample))


def _budget(task: Task, length: int, max_tokens: int | None) -> int:
    return length - (task.max_tokens if max_tokens is None else max_tokens)


def _check(task: Task, length: int, budget: int, used: int) -> None:
    if used > budget:
        raise UserError(
            f"--lengths: {format_count(length)}: {task.name} needs at least {used + length - budget} tokens here, "
            "answer included: raise it or leave the task out of --tasks"
        )
