"""The training run on samples of tasks: lengths by time, tasks by weight, accuracy by task."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from workers.training.checkpoint import write_weights
from workers.training.data import Batch, Curriculum, Document, collate
from workers.training.loop import Settings, Trainer
from workers.training.ruler.data import FIRST_WEIGHT, ORDERLESS, DocumentMaker, Sample, read_samples, token_id
from workers.training.ruler.start import initialise
from workers.training.ruler.vocabulary import extend, task_words, vocabulary_rows

STAGES = (0.0, 0.12, 0.25, 0.45)  # of the run: when the next longer samples begin; the last for all that are longer
CURRENT_SHARE = 0.7  # of steps at the longest length that has begun; the rest at any shorter one
WEIGHTS = {  # how often a task is drawn; 1 for all others
    "niah_single_1": 0.25, "niah_single_2": 0.25, "niah_multikey_1": 0.5, "niah_multikey_2": 2.0,
    "niah_multivalue": 1.5, "niah_multiquery": 1.5,
}  # fmt: skip
WINDOW = 20  # steps that accuracy is taken over
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@dataclass(frozen=True)
class RulerSettings(Settings):
    """Settings with the folder of samples."""

    data: Path = Path()


class Stages(Curriculum):
    """Lengths that begin one after the other as the run goes on."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(max(lengths))
        self.lengths = lengths

    def pick_at(self, fraction: float, rng: np.random.Generator) -> int:
        """Return the length of a step when `fraction` of the run is over."""
        stage = sum(fraction >= begin for begin in STAGES[: len(self.lengths)]) - 1
        if stage != self.stage:
            self.stage = stage
            self.recent.clear()
        if self.stage == 0 or rng.random() < CURRENT_SHARE:
            return self.lengths[self.stage]
        return self.lengths[int(rng.integers(self.stage))]

    def record(self, length: int, right: int, total: int) -> None:
        """Count a step."""
        self.steps += 1
        if length == self.lengths[self.stage]:
            self.recent.append((right, total))


class RulerTrainer(Trainer):
    """Trains on exported samples from a circuit that follows keys; `write` adds config and tokenizer to the weights."""

    settings: RulerSettings

    def read_config(self) -> dict[str, Any]:
        """Read samples and assets. ValueError: there are no samples."""
        assets = self.settings.assets
        self.samples: dict[int, dict[str, list[Sample]]] = {}
        for length, samples in read_samples(self.settings.data).items():
            for sample in samples:
                self.samples.setdefault(length, {}).setdefault(sample.task, []).append(sample)
        definition = extend(_read(assets / "tokenizer.json"), task_words(assets))
        self.tokenizer = Tokenizer.from_str(json.dumps(definition))
        rows = {"vocab_size": vocabulary_rows(definition)}
        self.files = {
            "config.json": _read(assets / "config.json") | rows,
            "config_1m.json": _read(assets / "config_1m.json") | rows,
            "tokenizer.json": definition,
            "tokenizer_config.json": _read(assets / "tokenizer_config.json") | {"chat_template": CHAT_TEMPLATE},
            "generation_config.json": _read(assets / "generation_config.json"),
        }
        self._recent: dict[str, deque[tuple[int, int]]] = {}
        return self.files["config.json"]

    def initialise(self) -> None:
        """Set the starting weights."""
        initialise(self.model, self.settings.seed, token_id(self.tokenizer, "-"))

    def make_curriculum(self) -> Curriculum:
        """Return the stages of the lengths there are samples of."""
        return Stages(sorted(self.samples))

    def draw(self, rng: np.random.Generator) -> Batch:
        """Draw the documents of one step."""
        assert isinstance(self.curriculum, Stages)
        length = self.curriculum.pick_at(self.fraction(), rng)
        tokens = self.settings.batch_tokens[0 if length == self.curriculum.lengths[0] else 1]
        by_task = self.samples[length]
        tasks = sorted(by_task)
        weights = np.array([WEIGHTS.get(task, 1.0) for task in tasks])
        maker = DocumentMaker(self.tokenizer, rng)
        documents: list[Document] = []
        self._tasks: list[str] = []
        while len(documents) < max(1, tokens // length):
            task = tasks[int(rng.choice(len(tasks), p=weights / weights.sum()))]
            sample = by_task[task][int(rng.integers(len(by_task[task])))]
            document = maker.make(sample, length)
            if document is not None:
                documents.append(document)
                self._tasks.append(task)
        self._rows = [len(document.answers) for document in documents]
        return collate(documents)

    def count(self, batch: Batch, predicted: Tensor) -> dict[str, float]:
        """Return the share of right outputs (their first tokens) of every task over the last steps with it.

        Where any order is right, an output is right that is among all of its document.
        """
        parts = zip(
            self._tasks,
            predicted.split(self._rows),
            batch.targets.split(self._rows),
            batch.weights.split(self._rows),
            strict=True,
        )
        counts: dict[str, tuple[int, int]] = {}
        for task, guesses, targets, weights in parts:
            rows = weights == FIRST_WEIGHT
            wanted, guessed = targets[rows], guesses[rows]
            hits = torch.isin(guessed, wanted) if task == ORDERLESS else guessed == wanted
            right, asked = counts.get(task, (0, 0))
            counts[task] = (right + int(hits.sum()), asked + len(wanted))
        for task, pair in counts.items():
            self._recent.setdefault(task, deque(maxlen=WINDOW)).append(pair)
        shares = {}
        for task in sorted(self._recent):
            right, asked = (sum(column) for column in zip(*self._recent[task], strict=True))
            shares[task] = right / max(1, asked)
        return shares

    def write(self) -> None:
        """Write the checkpoint directory."""
        out = self.settings.out
        out.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        write_weights(self.model, out)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
