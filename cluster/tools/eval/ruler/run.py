"""Tasks over lengths and modes: a cell is all samples of one task at one length in one mode."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.common.units import format_count
from cluster.config.deployment import Deployment
from cluster.engine.runtime import ClusterRuntime
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.display import Display, format_duration
from cluster.tools.eval.grid import Cell, GridRun, check_grid, layout, measurements, positions, raise_failed
from cluster.tools.eval.modes import MODES, Target, load_mode, set_aside
from cluster.tools.eval.ruler.export import export_path, write_samples
from cluster.tools.eval.ruler.prompts import PromptMaker
from cluster.tools.eval.ruler.sample import Sample, read_material
from cluster.tools.eval.ruler.scoring import interval, score
from cluster.tools.eval.ruler.tasks import TASKS, Task, check_fits, find_tasks, make_sample
from protos.errors import UserError
from protos.jobs.sampling import AnswerOptions


@dataclass(frozen=True, slots=True)
class RulerOptions:
    """What is asked. A length counts the prompt and the answer; `samples` are of a task and length."""

    lengths: tuple[int, ...] = (4096, 16384)
    tasks: tuple[str, ...] = tuple(TASKS)
    modes: tuple[str, ...] = MODES
    samples: int = 20
    seed: int = 0
    max_tokens: int | None = None  # of an answer; None: each task's own
    thinking: bool | None = False  # None leaves the choice to the chat template
    sparse_threshold: int | None = 0
    kv: str = "auto"
    document: Path | None = None
    more: Mapping[str, object] = field(default_factory=dict)  # further dotted keys of the YAML

    def __post_init__(self) -> None:
        find_tasks(self.tasks)
        check_grid(self.lengths, self.modes)


@dataclass(frozen=True, slots=True)
class Series:
    """All samples of a task at a length."""

    task: Task
    length: int

    def __str__(self) -> str:
        return f"{self.task.name} {format_count(self.length)}"


class SampleMaker:
    """Makes the samples of series for one tokenizer. The same options give the same samples."""

    def __init__(self, tokenizer: TextTokenizer, options: RulerOptions) -> None:
        """Raise UserError where a task does not fit a length."""
        self._options = options
        self._prompts = PromptMaker(tokenizer, options.thinking)
        self._material = read_material(options.document)
        self.series = [Series(task, length) for length in options.lengths for task in find_tasks(options.tasks)]
        for each in self.series:
            check_fits(each.task, self._material, each.length, self._prompts.count, options.max_tokens)

    def make(self, series: Series) -> Iterator[tuple[Sample, int]]:
        """Yield the samples of a series with the tokens of their prompts."""
        options, count = self._options, self._prompts.count
        for index in range(options.samples):
            yield make_sample(
                series.task, self._material, series.length, options.seed, index, count, options.max_tokens
            )

    def encode(self, sample: Sample) -> list[int]:
        """Return the token ids of a sample's prompt."""
        return self._prompts.encode(sample)

    def answer_tokens(self, series: Series) -> int:
        """Return the most tokens of an answer."""
        return series.task.max_tokens if self._options.max_tokens is None else self._options.max_tokens


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
                target, mode, max(options.lengths), sparse_threshold=options.sparse_threshold, kv=options.kv,
                more=options.more,
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
        for sample, _ in self._samples.make(document):
            samples.append(sample)
            prompts.append(self._samples.encode(sample))
            self.display.amount("making samples", len(samples), 0)
        ask = AnswerOptions(max_tokens=self._samples.answer_tokens(document), enable_thinking=self.options.thinking)
        began = time.monotonic()
        answers = runtime.generate(prompts, ask, self.display.reading(len(prompts)))
        raise_failed(answers)
        scores = [
            round(score(answer.text, sample.outputs, document.task.match), 4)
            for sample, answer in zip(samples, answers, strict=True)
        ]
        outcomes = [
            {"outputs": list(sample.outputs), "answer": answer.text.strip(), "score": each}
            for sample, answer, each in zip(samples, answers, scores, strict=True)
        ]
        low, high = interval(scores)
        return {
            "score": round(sum(scores) / len(scores), 4),
            "interval": [round(low, 4), round(high, 4)],
            "samples": len(scores),
            "prompt_tokens": max(map(len, prompts)),
            **measurements(answers),
            "total_s": round(time.monotonic() - began, 2),
            "outcomes": outcomes,
        }

    def place(self, document: Series) -> Cell:
        """Return task and length."""
        return {"task": document.task.name, "length": document.length}

    def name(self, document: Series) -> str:
        """Return task and length."""
        return str(document)

    def summary(self, cell: Cell) -> str:
        """Return the score and the time."""
        low, high = cell["interval"]
        taken = format_duration(cell["total_s"])
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
        for key, value in json.loads(json.dumps(self.report)).items():
            if key not in ("cells", "complete") and earlier.get(key) != value:
                problem = f"has another {key} ({earlier.get(key)!r}, now {value!r})"
                raise UserError(f"--resume: {problem}: give the same options, or start a new result")
        self.report["cells"] = [cell for cell in earlier["cells"] if "error" not in cell]


def open_tokenizer(deployment: Deployment) -> TextTokenizer:
    """Return the tokenizer of a deployment's checkpoint. Raises TokenizerError."""
    return TextTokenizer.open(deployment.config.model.path, deployment.config.model.chat_template)


def export(target: Target, options: RulerOptions, folder: Path, display: Display) -> int:
    """Write the samples of all tasks and lengths as RULER's jsonl, and return how many. Raises UserError."""
    settings = target.settings(options.more)
    maker = SampleMaker(TextTokenizer.open(settings.path, settings.chat_template), options)
    for number, series in enumerate(maker.series, 1):
        display.status(f"[{number}/{len(maker.series)}] {series}")
        answer = maker.answer_tokens(series)
        samples = ((sample, tokens + answer) for sample, tokens in maker.make(series))
        write_samples(export_path(folder, series.length, series.task.name), samples)
    return len(maker.series) * options.samples
