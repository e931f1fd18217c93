"""Training documents out of exported samples: prompt, answer, and more questions about the same text.

Samples are JSON lines with `input`, `answer_prefix` and `outputs`, in folders `LENGTH/TASK/`, as
`longreach eval ruler --export` writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from workers.training.data import Document

END = "<|endoftext|>"
FIRST_WEIGHT = 5.0  # of the loss of an output's first token, which is looked up; the others mostly continue it
MAX_FOLLOW_UPS = 12  # further questions about a document
NEEDLE = re.compile(r"One of the special magic (?P<kind>\w+) for (?P<key>\S+) is: (?P<value>\S+)\.")
ORDERLESS = "cwe"  # any order of its outputs is right: they are learned in random order, and not counted as exact


@dataclass(frozen=True, slots=True)
class Sample:
    """One exported sample."""

    task: str
    input: str
    answer_prefix: str
    outputs: tuple[str, ...]

    @property
    def in_order(self) -> tuple[str, ...]:
        """The outputs in the order in which a reader meets them; of several queries, in that of the queries."""
        if self.task == "niah_multiquery":
            return self.outputs
        return tuple(sorted(self.outputs, key=self.input.rfind))


def read_samples(folder: Path) -> dict[int, list[Sample]]:
    """Return the samples of every length. ValueError: there are none, or a line is not a sample."""
    found: dict[int, list[Sample]] = {}
    for path in sorted(folder.glob("*/*/*.jsonl")):
        length, task = path.parts[-3], path.parts[-2]
        if not length.isdecimal():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                sample = Sample(task, entry["input"], entry["answer_prefix"], tuple(entry["outputs"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"--data: {path}, line {number}: not a sample of a task; export it again") from error
            found.setdefault(int(length), []).append(sample)
    if not found:
        raise ValueError(
            f"--data: {folder} has no LENGTH/TASK/*.jsonl; write some with longreach eval ruler --export {folder}"
        )
    return found


def token_id(tokenizer: Tokenizer, text: str) -> int:
    """Return the id of a token."""
    found = tokenizer.token_to_id(text)
    assert found is not None, text
    return int(found)


class DocumentMaker:
    """Makes documents of exact lengths out of samples."""

    def __init__(self, tokenizer: Tokenizer, rng: np.random.Generator) -> None:
        self.tokenizer = tokenizer
        self.rng = rng
        self.end = token_id(tokenizer, END)

    def make(self, sample: Sample, length: int) -> Document | None:
        """Return prompt and answer, then follow-up questions while there is room, then end tokens; None if too long."""
        document = Document()
        is_counted = sample.task != ORDERLESS
        self._add(document, sample.input + sample.answer_prefix, *find_example(sample), is_counted)
        outputs = sample.in_order if is_counted else tuple(self.rng.permutation(sample.outputs).tolist())
        self._answer(document, sample.task, outputs, is_counted)
        if len(document.tokens) > length:
            return None
        for question, values in self.follow_ups(sample):
            longer = Document(list(document.tokens), dict(document.answers))
            self._add(longer, question, 0, 0, (), is_counted)
            self._answer(longer, sample.task, values, is_counted)
            if len(longer.tokens) > length:
                break
            document = longer
        document.add([self.end] * (length - len(document.tokens)))
        return document

    def follow_ups(self, sample: Sample) -> list[tuple[str, tuple[str, ...]]]:
        """Return other questions about the sentences hidden in a sample, with their outputs, in random order."""
        values: dict[tuple[str, str], list[str]] = {}
        for found in NEEDLE.finditer(sample.input):
            values.setdefault((found["kind"], found["key"]), []).append(found["value"])
        keys = list(values)
        chosen = [keys[i] for i in self.rng.permutation(len(keys))[:MAX_FOLLOW_UPS]]
        return [(_question(kind, key, len(values[kind, key])), tuple(values[kind, key])) for kind, key in chosen]

    def _answer(self, document: Document, task: str, outputs: Sequence[str], is_counted: bool) -> None:
        if task == ORDERLESS:
            text = "".join(f" {number}. {output}" for number, output in enumerate(outputs, 1))
        else:
            text = " ".join(outputs) if task == "vt" else f" {', '.join(outputs)}"
        self._add(document, f"{text}.{END}", 0, len(text) + 1 + len(END), outputs, is_counted)

    def _add(
        self, document: Document, text: str, begin: int, end: int, outputs: Sequence[str], is_counted: bool
    ) -> None:
        """Append `text`; the tokens of its characters `begin` to `end`, where `outputs` stand in order, are scored."""
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        at, firsts = begin, set()
        for output in outputs:
            at = text.index(output, at)
            firsts.add(at)
            at += len(output)
        start = len(document.tokens)
        document.add(list(encoded.ids))
        for index, (left, right) in enumerate(encoded.offsets):
            if begin <= left < end:
                is_first = any(left <= first < right for first in firsts)
                document.answers[start + index] = (FIRST_WEIGHT if is_first else 1.0, is_first and is_counted)


def find_example(sample: Sample) -> tuple[int, int, tuple[str, ...]]:
    """Return where in the prompt the answer of an example stands (characters), and its outputs; (0, 0, ()) without."""
    stem = re.sub(r"[0-9]+", "[0-9]+", re.escape(sample.answer_prefix.rpartition(":")[0]))
    found = re.search(rf"{stem}:(?P<answer>[^\n]+)\n", sample.input) if stem else None
    if found is None:
        return 0, 0, ()
    return *found.span("answer"), tuple(re.findall(r"[A-Za-z]+", found["answer"]))


def _question(kind: str, key: str, count: int) -> str:
    one = count == 1
    kind = kind.removesuffix("s") if one else kind
    verb = "is" if one else "are"
    asked = f"What {'is' if one else 'are all'} the special magic {kind} for {key} mentioned in the provided text?"
    return f"\n{asked} The special magic {kind} for {key} mentioned in the provided text {verb}"
