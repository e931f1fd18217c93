"""Result files: their names, how they are written, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.tools.eval.results import ResultFile, read_result
from protos.errors import UserError


def test_result_files_are_dated_and_never_replaced(tmp_path: Path) -> None:
    first = ResultFile(tmp_path, "eval-x")
    first.write({"what": "needle"})
    second = ResultFile(tmp_path, "eval-x")
    date = first.environment["date"][:10]
    assert (first.path.name, second.path.name) == (f"eval-x-{date}.json", f"eval-x-{date}-2.json")
    assert read_result(first.path)["environment"]["cores"] >= 1
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]  # no half-written file stays
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="--out"):
        ResultFile(blocked / "below", "eval-x")


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    first = ResultFile(tmp_path, "eval-x")
    first.write({"what": "ruler", "cells": []})
    again = ResultFile(tmp_path / "unused", "eval-x", first.path)
    again.write({"what": "ruler", "cells": [1]})
    assert read_result(first.path)["cells"] == [1]
    assert [path.name for path in tmp_path.iterdir()] == [first.path.name]


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[]", "not a result"), ("{}", "not a result")])
def test_other_files_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_result(tmp_path / "x.json")
