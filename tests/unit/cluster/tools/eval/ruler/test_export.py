"""Files of samples in RULER's fields."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.tools.eval.ruler.export import export_path, write_samples
from cluster.tools.eval.ruler.sample import Sample
from protos.errors import UserError


def test_a_line_a_sample(tmp_path: Path) -> None:
    path = export_path(tmp_path, 4096, "vt")
    assert path == tmp_path / "4096" / "vt" / "validation.jsonl"
    write_samples(path, [(Sample("0123 é", " a:", ("3", "x")), 7), (Sample("ab", " b:", ("z",)), 9)])
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {
            "index": 0, "input": "0123 é", "outputs": ["3", "x"], "length": 7, "answer_prefix": " a:",
            "token_position_answer": 0.5,
        },
        {
            "index": 1, "input": "ab", "outputs": ["z"], "length": 9, "answer_prefix": " b:",
            "token_position_answer": -1,
        },
    ]  # fmt: skip
    assert [entry.name for entry in path.parent.iterdir()] == ["validation.jsonl"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--export: .*name another folder"):
        write_samples(tmp_path / "file" / "x.jsonl", [])
