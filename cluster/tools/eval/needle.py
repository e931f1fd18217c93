"""Needles over depth and length: facts hidden in documents of several lengths, asked for in several modes of attention.

Each mode is one cluster; each cell of its grid is one document, read once, with all its questions. A cell that fails
holds the reason and leaves the others as they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.common.errors import ClusterError, EngineError
from cluster.common.text_format import one_line
from cluster.common.units import format_count
from cluster.config.deployment import Deployment
from cluster.engine.attention_report import describe_sparsity
from cluster.engine.outputs import Generation
from cluster.engine.runtime import ClusterRuntime, longest
from cluster.text.tokenizer import TextTokenizer
from cluster.tools.assets import needle_dir
from cluster.tools.display import Display, format_duration
from cluster.tools.eval.haystack import Form, Haystack, Needle, build_haystack, finds_code, is_right, read_source
from cluster.tools.eval.modes import MODES, Target, load_mode, set_aside
from protos.errors import UserError
from protos.jobs.sampling import AnswerOptions
from protos.model.spec import ModelSpec
from protos.node.node_check import NodeError

_BROKEN = (ClusterError, NodeError)  # the cluster's fault, not the input's
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
        for name, values in (("--lengths", self.lengths), ("--modes", self.modes)):
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name}: {','.join(map(str, values))}: must name at least one, and each once")


@dataclass(frozen=True, slots=True)
class Document:
    """One cell of the grid before it is asked."""

    length: int
    trial: int
    haystack: Haystack
    prompts: list[list[int]]


class NeedleRun:
    """One evaluation: checked and prepared when made, run once by `run`; `report` can be written at any time."""

    def __init__(self, target: Target, options: NeedleOptions, display: Display) -> None:
        """Load every mode and hide the needles. Raises UserError for anything that cannot be."""
        self.options = options
        self._display = display
        self._on_cell: Callable[[dict[str, Any]], None] = lambda report: None
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

    def run(self, on_cell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Run every mode and return the report.

        Args:
            on_cell: called with the report after every cell, and once it is complete.

        Raises:
            UserError: a checkpoint cannot be loaded. A cluster that fails is reported in its cells.
        """
        self._on_cell = on_cell
        for mode, deployment in self.deployments.items():
            self._run_mode(mode, deployment)
        self.report["complete"] = True
        self._on_cell(self.report)
        return self.report

    def _documents(self, tokenizer: TextTokenizer) -> Iterator[Document]:
        options = self.options
        source = read_source(needle_dir(), options.document)
        for length in options.lengths:
            for trial in range(options.trials):
                self._display.status(f"hiding needles in {format_count(length)} tokens")
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
            "layout": f"{config.cluster.pipeline_parallel_size} x {config.cluster.expert_parallel_size}",
            "form": options.form,
            "scoring": "exact answer" if self.trained else "first five-digit number of the answer",
            "shared_words": options.shared_words,
            "needles": options.needles,
            "trials": options.trials,
            "lengths": list(options.lengths),
            "modes": {mode: _positions(spec) for mode, spec in specs.items()},
            "kv": options.kv,
            "text": "book" if options.document is None else options.document.name,
            "seed": options.seed,
            "complete": False,
            "cells": [],
        }

    def _run_mode(self, mode: str, deployment: Deployment) -> None:
        waiting = list(self.documents)
        self._display.label(mode)
        runtime = ClusterRuntime(deployment, self._display.launch)
        start: Callable[[], None] | None = runtime.start
        try:
            while waiting:
                if start is not None:
                    start()
                start = None
                self._display.label(f"{mode} {format_count(waiting[0].length)}")
                try:
                    cell = self._ask(runtime, waiting[0])
                except (UserError, *_BROKEN) as error:
                    cell = {"error": str(error)}
                    start = runtime.restart if isinstance(error, _BROKEN) else None
                self._add(mode, waiting.pop(0), cell)
        except _BROKEN as error:
            for document in waiting:
                self._add(mode, document, {"error": f"the cluster did not start: {error}"})
        finally:
            runtime.close()
            self._display.label("")

    def _ask(self, runtime: ClusterRuntime, document: Document) -> dict[str, Any]:
        options = self.options
        ask = AnswerOptions(max_tokens=options.max_tokens, enable_thinking=options.thinking)
        began = time.monotonic()
        follow = self._display.reading(len(document.prompts))
        answers = runtime.generate(document.prompts, ask, follow, longest(document.prompts))
        failed = [answer.error for answer in answers if answer.error]
        if failed:
            raise EngineError(failed[0])
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

    def _add(self, mode: str, document: Document, cell: dict[str, Any]) -> None:
        place = {"mode": mode, "length": document.length, "trial": document.trial}
        tokens = document.haystack.num_tokens
        self.report["cells"].append(place | {"prompt_tokens": tokens, "total": self.options.needles} | cell)
        self._on_cell(self.report)
        done, total = len(self.report["cells"]), len(self.documents) * len(self.deployments)
        said = f"failed: {cell['error']}" if "error" in cell else (
            f"{cell['right']} of {self.options.needles} right in {format_duration(cell['total_s'])}"
        )  # fmt: skip
        self._display.say(f"[{done}/{total}] {mode} {format_count(document.length)}: {one_line(said)}")


def measurements(answers: Sequence[Generation]) -> dict[str, Any]:
    """Return what reading the document took, by the question that computed most of it (seconds, tokens a second)."""
    reader = min(answers, key=lambda answer: answer.cached_tokens)
    computed, seconds = reader.prompt_tokens - reader.cached_tokens, reader.timings.prefill_s
    figures: dict[str, Any] = {
        "ttft_s": round(min(answer.timings.ttft_s for answer in answers), 3),
        "prefill_tokens_per_s": round(computed / seconds, 1) if seconds > 0 else None,
        "cached_tokens": sum(answer.cached_tokens for answer in answers),
    }
    if reader.attention is not None and reader.attention.mode == "sparse":
        figures["attention"] = reader.attention.to_json()
        del figures["attention"]["layers"]  # `eval recall` is for the figures of single heads
    return figures


def _positions(spec: ModelSpec) -> dict[str, Any]:
    """Return what distinguishes a mode from the others, as the model will compute it."""
    facts: dict[str, Any] = {"rope": spec.rope.kind, "factor": spec.rope.factor}
    if spec.dual_chunk is not None:
        facts["dual_chunk"] = asdict(spec.dual_chunk)
    if spec.sparse is not None:
        facts["sparse"] = describe_sparsity(spec)
    return facts
