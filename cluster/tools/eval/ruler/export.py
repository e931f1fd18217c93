"""Samples as files, in the fields and folders that RULER's own scripts use."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from cluster.tools.eval.ruler.sample import Sample
from protos.errors import UserError


def export_path(folder: Path, length: int, task: str) -> Path:
    """Return the place of a task's samples: `FOLDER/LENGTH/TASK/validation.jsonl`, the length in tokens."""
    return folder / str(length) / task / "validation.jsonl"


def write_samples(path: Path, samples: Iterable[tuple[Sample, int]]) -> None:
    """Write a JSON object a line for samples and their lengths (tokens of prompt and answer). Raises UserError.

    Fields: `index`, `input`, `outputs`, `length`, `answer_prefix`, and `token_position_answer`, which is the first
    character of the first output in `input` as a share of it, or -1 where it does not stand there.
    """
    lines = []
    for index, (sample, length) in enumerate(samples):
        at = sample.input.find(sample.outputs[0])
        record = {
            "index": index,
            "input": sample.input,
            "outputs": list(sample.outputs),
            "length": length,
            "answer_prefix": sample.answer_prefix,
            "token_position_answer": round(at / len(sample.input), 4) if at >= 0 else -1,
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".jsonl.part")
        partial.write_text("".join(lines), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"--export: {path}: cannot be written ({error.strerror}): name another folder") from error
