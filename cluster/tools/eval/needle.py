"""Needles over depth and length: facts hidden in documents of several lengths, asked for in several modes of attention.

Each cell is one document in one mode, read once, with all its questions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.common.units import format_count
from cluster.config.deployment import Deployment
from cluster.engine.runtime import ClusterRuntime, longest
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.display import Display, format_duration
from cluster.tools.eval.grid import Cell, GridRun, check_grid, layout, measurements, positions, raise_failed
from cluster.tools.eval.haystack import Form, Haystack, Needle, build_haystack, finds_code, is_right, read_source
from cluster.tools.eval.modes import MODES, Target, load_mode, set_aside
from protos.jobs.sampling import AnswerOptions

_PRIVATE_TOKENS = 8192 + 512  # KV that a question may need beside its document: a sparse cell, question and answer


@dataclass(frozen=True, slots=True)
class NeedleOptions:
    """What is hidden and how it is asked. A length counts the prompt and `max_tokens` of answer."""

    lengths: tuple[int, ...] = (4096, 16384, 65536)
    needles: int = 8
    modes: tuple[str, ...] = MODES
    form: str = "answer"  # or prompt: the answer is begun up to its code
    shared_words: bool = False
    trials: int = 1  # documents a length, with seeds that follow each other
    seed: int = 0
    max_tokens: int = 24
    thinking: bool | None = False  # None leaves the choice to the chat template
    sparse_threshold: int | None = 0
    kv: str = "auto"
    document: Path | None = None
    more: Mapping[str, object] = field(default_factory=dict)  # further dotted keys of the YAML

    def __post_init__(self) -> None:
        check_grid(self.lengths, self.modes)


@dataclass(frozen=True, slots=True)
class Document:
    """One cell of the grid before it is asked."""

    length: int
    trial: int
    haystack: Haystack
    prompts: list[list[int]]


class NeedleRun(GridRun[Document]):
    """One evaluation: checked and prepared when made, run once by `run`; `report` can be written at any time."""

    def __init__(self, target: Target, options: NeedleOptions, display: Display) -> None:
        """Load every mode and hide the needles. Raises UserError for anything that cannot be."""
        self.options = options
        self.display = display
        self.deployments = {
            mode: load_mode(
                target, mode, max(options.lengths), extra_tokens=options.needles * _PRIVATE_TOKENS,
                sparse_threshold=options.sparse_threshold, kv=options.kv, more=options.more,
            )
            for mode in options.modes
        }  # fmt: skip
        for mode, deployment in self.deployments.items():
            for line in set_aside(target, mode, deployment):
                display.say(line)
        first = next(iter(self.deployments.values()))
        self.trained = (first.config.model.path / "words.json").is_file()  # on this task: it gives exact answers
        tokenizer = TextTokenizer.open(first.config.model.path, first.config.model.chat_template)
        self._form = Form(first.config.model.document_prompt, options.thinking, options.form == "prompt")
        self.documents = list(self._documents(tokenizer))
        self.report = self._heading(first)

    def _documents(self, tokenizer: TextTokenizer) -> Iterator[Document]:
        options = self.options
        source = read_source(needle_dir(), options.document)
        for length in options.lengths:
            for trial in range(options.trials):
                self.display.status(f"hiding needles in {format_count(length)} tokens")
                seed = options.seed + trial
                haystack = build_haystack(
                    tokenizer, length - options.max_tokens, options.needles, seed, source.rotate(seed),
                    share_words=options.shared_words, form=self._form,
                )  # fmt: skip
                prompts = self._form.prompts(tokenizer, haystack.document, haystack.needles, length, options.max_tokens)
                yield Document(length, trial, haystack, prompts)

    def _heading(self, deployment: Deployment) -> dict[str, Any]:
        config, options = deployment.config, self.options
        specs = {mode: each.spec for mode, each in self.deployments.items()}
        return {
            "what": "needle",
            "model": config.model.served_model_name,
            "layout": layout(deployment),
            "form": options.form,
            "scoring": "exact answer" if self.trained else "first five-digit number of the answer",
            "shared_words": options.shared_words,
            "needles": options.needles,
            "trials": options.trials,
            "lengths": list(options.lengths),
            "modes": {mode: positions(spec) for mode, spec in specs.items()},
            "kv": options.kv,
            "text": "book" if options.document is None else options.document.name,
            "seed": options.seed,
            "complete": False,
            "cells": [],
        }

    def ask(self, runtime: ClusterRuntime, document: Document) -> Cell:
        """Ask for all needles of a document at once."""
        options = self.options
        ask = AnswerOptions(max_tokens=options.max_tokens, enable_thinking=options.thinking)
        began = time.monotonic()
        follow = self.display.reading(len(document.prompts))
        answers = runtime.generate(document.prompts, ask, follow, longest(document.prompts))
        raise_failed(answers)
        outcomes = [
            {
                "depth": round(needle.depth, 4), "question": needle.question, "truth": needle.code,
                "answer": answer.text.strip(), "right": self._is_right(answer.text, needle),
            }
            for needle, answer in zip(document.haystack.needles, answers, strict=True)
        ]  # fmt: skip
        return {
            "right": sum(outcome["right"] for outcome in outcomes),
            **measurements(answers),
            "total_s": round(time.monotonic() - began, 2),
            "outcomes": outcomes,
        }

    def _is_right(self, answer: str, needle: Needle) -> bool:
        return is_right(answer, needle, self._form.begun) if self.trained else finds_code(answer, needle)

    def place(self, document: Document) -> Cell:
        """Return the length, trial and prompt tokens of a document, and how many needles it has."""
        tokens = document.haystack.num_tokens
        where = {"length": document.length, "trial": document.trial}
        return where | {"prompt_tokens": tokens, "total": self.options.needles}

    def name(self, document: Document) -> str:
        """Return the length."""
        return format_count(document.length)

    def summary(self, cell: Cell) -> str:
        """Return the score and the time."""
        return f"{cell['right']} of {self.options.needles} right in {format_duration(cell['total_s'])}"
