"""Tasks over lengths and modes: a cell is all samples of one task at one length in one mode.

With several questions a haystack, a cell is one haystack instead: it is read once for all tasks that share it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from cluster.common.units import format_count
from cluster.config.deployment import Deployment
from cluster.engine.outputs import Generation
from cluster.engine.runtime import ClusterRuntime, longest
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.display import Display, format_duration
from cluster.tools.eval.grid import Cell, GridRun, check_grid, layout, measurements, positions, raise_failed
from cluster.tools.eval.modes import MODES, Target, load_mode, set_aside
from cluster.tools.eval.ruler.export import export_path, write_samples
from cluster.tools.eval.ruler.prompts import PromptMaker
from cluster.tools.eval.ruler.sample import NOT_RULER, Sample, read_material
from cluster.tools.eval.ruler.scoring import interval, score
from cluster.tools.eval.ruler.tasks import TASKS, Task, TaskGroup, check_fits, find_tasks, group_tasks, make_samples
from protos.errors import UserError
from protos.jobs.sampling import AnswerOptions

_QUESTION_TOKENS = 1024  # KV that a question needs beside its haystack: question and answer
_CELL_TOKENS = 8192  # more of them after sparse prefill, which shares whole cells
_AT_ONCE = 8  # questions that have this room; others of the haystack wait for one of them to end


@dataclass(frozen=True, slots=True)
class RulerOptions:
    """What is asked. A length counts the prompt and the answer; `samples` are of a task and length.

    With several `questions` a haystack, the samples of a task are that many in each, and tasks share haystacks.
    """

    lengths: tuple[int, ...] = (4096, 16384)
    tasks: tuple[str, ...] = tuple(TASKS)
    modes: tuple[str, ...] = MODES
    samples: int = 20
    questions: int = 1
    seed: int = 0
    max_tokens: int | None = None  # of an answer; None: each task's own
    thinking: bool | None = False  # None leaves the choice to the chat template
    sparse_threshold: int | None = 0
    kv: str = "auto"
    document: Path | None = None
    more: Mapping[str, object] = field(default_factory=dict)  # further dotted keys of the YAML

    def __post_init__(self) -> None:
        check_grid(self.lengths, self.modes)
        if self.samples % self.questions:
            raise UserError(f"--questions: {self.questions}: must divide --samples, which is {self.samples}")
        self.groups()

    def groups(self) -> list[TaskGroup]:
        """Return the tasks in groups that share haystacks. Raises UserError."""
        return group_tasks(find_tasks(self.tasks), self.questions)

    def extra_tokens(self, mode: str) -> int:
        """Return the tokens of KV that questions about one haystack need beside it."""
        if self.questions == 1:
            return 0
        most = max(len(group.asked) for group in self.groups())
        return min(most, _AT_ONCE) * (_QUESTION_TOKENS + (_CELL_TOKENS if mode == "sparse" else 0))


@dataclass(frozen=True, slots=True)
class Series:
    """The samples of a cell: all of one task at a length, or those of tasks that share one haystack."""

    group: TaskGroup
    length: int
    haystacks: range

    def __str__(self) -> str:
        haystack = f" haystack {self.haystacks[0]}" if self.group.questions > 1 else ""
        return f"{self.group.name} {format_count(self.length)}{haystack}"


class SampleMaker:
    """Makes the samples of series for one tokenizer. The same options give the same samples."""

    def __init__(self, tokenizer: TextTokenizer, options: RulerOptions) -> None:
        """Raise UserError where a task does not fit a length."""
        self._options = options
        self._prompts = PromptMaker(tokenizer, options.thinking)
        self._material = read_material(options.document)
        haystacks = range(options.samples // options.questions)
        cells = [haystacks] if options.questions == 1 else [haystacks[at : at + 1] for at in haystacks]
        self.groups = options.groups()
        self.series = [
            Series(group, length, each) for length in options.lengths for each in cells for group in self.groups
        ]
        for length in options.lengths:
            for group in self.groups:
                check_fits(group, self._material, length, self._prompts.count, options.max_tokens)

    def make(self, series: Series) -> Iterator[tuple[Task, Sample]]:
        """Yield the samples of a series, haystack by haystack, with the task of each."""
        options, count = self._options, self._prompts.count
        for index in series.haystacks:
            samples, _ = make_samples(
                series.group, self._material, series.length, options.seed, index, count, options.max_tokens
            )
            yield from zip(series.group.asked, samples, strict=True)

    def encode(self, sample: Sample) -> list[int]:
        """Return the token ids of a sample's prompt."""
        return self._prompts.encode(sample)

    def answer_tokens(self, series: Series) -> int:
        """Return the most tokens of an answer."""
        return series.group.max_tokens if self._options.max_tokens is None else self._options.max_tokens


class RulerRun(GridRun[Series]):
    """One evaluation: checked when made, run once by `run`; `report` can be written at any time."""

    def __init__(
        self, target: Target, options: RulerOptions, display: Display, earlier: Mapping[str, Any] | None = None
    ) -> None:
        """Load every mode. Raises UserError for anything that cannot be.

        Args:
            earlier: a report of the same evaluation; its cells without error are kept, and not run again.
        """
        self.options, self.display = options, display
        self.deployments = {
            mode: load_mode(
                target, mode, max(options.lengths), extra_tokens=options.extra_tokens(mode),
                sparse_threshold=options.sparse_threshold, kv=options.kv, more=options.more,
            )
            for mode in options.modes
        }  # fmt: skip
        for mode, deployment in self.deployments.items():
            for line in set_aside(target, mode, deployment):
                display.say(line)
        first = next(iter(self.deployments.values()))
        self._samples = SampleMaker(open_tokenizer(first), options)
        self.documents = self._samples.series
        self.report = self._heading(first)
        if earlier is not None:
            self._continue(earlier)

    def ask(self, runtime: ClusterRuntime, document: Series) -> Cell:
        """Ask for all samples of a series at once."""
        samples, prompts = [], []
        for each in self._samples.make(document):
            samples.append(each)
            prompts.append(self._samples.encode(each[1]))
            self.display.amount("making samples", len(samples), 0)
        ask = AnswerOptions(max_tokens=self._samples.answer_tokens(document), enable_thinking=self.options.thinking)
        began = time.monotonic()
        pinned = longest(prompts) if document.group.questions > 1 else 0
        answers = runtime.generate(prompts, ask, self.display.reading(len(prompts)), pinned)
        raise_failed(answers)
        outcomes = _outcomes(samples, answers)
        scores = [outcome["score"] for outcome in outcomes]
        if document.group.questions == 1:
            figures = {"interval": [round(end, 4) for end in interval(scores)]}
        else:  # intervals are of all haystacks
            figures = {}
            outcomes = [{"task": task.name} | each for (task, _), each in zip(samples, outcomes, strict=True)]
        return {
            "score": round(sum(scores) / len(scores), 4),
            **figures,
            "samples": len(scores),
            "prompt_tokens": max(map(len, prompts)),
            **measurements(answers),
            "total_s": round(time.monotonic() - began, 2),
            "outcomes": outcomes,
        }

    def place(self, document: Series) -> Cell:
        """Return the task, or those of a haystack, the length, and which haystack it is where that is one cell."""
        place: Cell = {"task": document.group.name, "length": document.length}
        return place | ({"haystack": document.haystacks[0]} if document.group.questions > 1 else {})

    def name(self, document: Series) -> str:
        """Return task, length and haystack."""
        return str(document)

    def summary(self, cell: Cell) -> str:
        """Return the score and the time."""
        taken = format_duration(cell["total_s"])
        if "interval" not in cell:
            return f"{100 * cell['score']:.0f}, {cell['samples']} questions, in {taken}"
        low, high = cell["interval"]
        return f"{100 * cell['score']:.0f} ({100 * low:.0f} to {100 * high:.0f}) in {taken}"

    def _heading(self, deployment: Deployment) -> dict[str, Any]:
        options = self.options
        return {
            "what": "ruler",
            "model": deployment.config.model.served_model_name,
            "layout": layout(deployment),
            "scoring": "share of wanted strings in the answer (qa_synthetic: any), whatever their case",
            "tasks": list(options.tasks),
            "samples": options.samples,
            "questions": options.questions,
            **({"note": f"questions: {options.questions} a haystack; {NOT_RULER}"} if options.questions > 1 else {}),
            "lengths": list(options.lengths),
            "modes": {mode: positions(each.spec) for mode, each in self.deployments.items()},
            "kv": options.kv,
            "text": "book" if options.document is None else options.document.name,
            "seed": options.seed,
            "max_tokens": options.max_tokens,
            "thinking": options.thinking,
            "complete": False,
            "cells": [],
        }

    def _continue(self, earlier: Mapping[str, Any]) -> None:
        earlier = {"questions": 1} | dict(earlier)
        for key, value in json.loads(json.dumps(self.report)).items():
            if key not in ("cells", "complete") and earlier.get(key) != value:
                problem = f"has another {key} ({earlier.get(key)!r}, now {value!r})"
                raise UserError(f"--resume: {problem}: give the same options, or start a new result")
        self.report["cells"] = [cell for cell in earlier["cells"] if "error" not in cell]


def _outcomes(samples: Sequence[tuple[Task, Sample]], answers: Sequence[Generation]) -> list[dict[str, Any]]:
    return [
        {
            "outputs": list(sample.outputs),
            "answer": answer.text.strip(),
            "score": round(score(answer.text, sample.outputs, task.match), 4),
        }
        for (task, sample), answer in zip(samples, answers, strict=True)
    ]


def open_tokenizer(deployment: Deployment) -> TextTokenizer:
    """Return the tokenizer of a deployment's checkpoint. Raises TokenizerError."""
    return TextTokenizer.open(deployment.config.model.path, deployment.config.model.chat_template)


def export(target: Target, options: RulerOptions, folder: Path, display: Display) -> int:
    """Write the samples of all tasks and lengths as RULER's jsonl, and return how many. Raises UserError."""
    settings = target.settings(options.more)
    maker = SampleMaker(TextTokenizer.open(settings.path, settings.chat_template), options)
    places = [*product(options.lengths, maker.groups)]
    for number, (length, group) in enumerate(places, 1):
        display.status(f"[{number}/{len(places)}] {group.name} {format_count(length)}")
        made: dict[str, list[Sample]] = {task.name: [] for task in group.tasks}
        series = Series(group, length, range(options.samples // options.questions))
        for task, sample in maker.make(series):
            made[task.name].append(sample)
        for name, samples in made.items():
            lengths = (len(maker.encode(sample)) + maker.answer_tokens(series) for sample in samples)
            write_samples(export_path(folder, length, name), zip(samples, lengths, strict=True))
    return len(options.lengths) * len(options.tasks) * options.samples
