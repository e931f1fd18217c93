"""Results that are kept between runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.bench.resumable import Results

RUN = {"what": "test", "seed": 1}


def test_what_was_done_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = Results(path, RUN)
    assert first.rows == []
    first.add({"n": 1})
    first.add({"n": 2})
    again = Results(path, RUN)
    assert again.rows == [{"n": 1}, {"n": 2}]
    again.add({"n": 3})
    assert Results(path, RUN).rows == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_row_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Results(path, RUN).add({"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2, "x": ')
    again = Results(path, RUN)
    again.add({"n": 2})
    assert Results(path, RUN).rows == [{"n": 1}, {"n": 2}]


def test_a_file_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Results(path, RUN)
    with pytest.raises(ValueError, match="it is of another run"):
        Results(path, RUN | {"seed": 2})


def test_without_a_file_rows_are_only_kept(tmp_path: Path) -> None:
    results = Results(None, RUN)
    results.add({"n": 1})
    assert results.rows == [{"n": 1}]
    assert list(tmp_path.iterdir()) == []
