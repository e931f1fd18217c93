"""The file of a benchmark of GPUs: what counts as done, and what a cut leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workers.bench.gpu.journal import Journal, read_lines


def test_what_is_done_stays_done_and_what_failed_is_repeated_by_the_next_call(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    first, second = Journal(path, "a"), Journal(path, "b")
    for case, state in (("one", "done"), ("two", "failed"), ("three", "begun")):
        first.write("kernels", case, "begun", {"limit_s": 7})
        if state != "begun":
            first.write("kernels", case, state, {"ms": 1.5})
    assert second.done() == {("kernels", "one")}
    assert first.failed_here() == {("kernels", "two")}
    assert second.failed_here() == set()
    assert second.open_case() is None
    at = first.open_case()
    assert at is not None
    assert (at["case"], at["limit_s"]) == ("three", 7)
    first.write("kernels", "three", "part", {"seconds": 3})
    assert first.open_case() == at
    second.write("kernels", "one", "done", {"ms": 2.5})
    newest = first.newest("kernels", "one")
    assert newest is not None
    assert newest["ms"] == 2.5
    assert first.newest("kernels", "two") is None


def test_a_rehearsal_is_marked_and_does_nothing_for_a_measurement(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    Journal(path, "a", rehearsal=True).write("env", "card", "done")
    assert json.loads(path.read_text())["rehearsal"] is True
    assert Journal(path, "b").done() == set()
    assert Journal(path, "c", rehearsal=True).done() == {("env", "card")}


def test_a_line_that_was_cut_is_left_out_and_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert read_lines(path) == []
    Journal(path, "a").write("env", "card", "done", {"path": path})
    with path.open("a") as file:
        file.write('{"stage": "env", "ca')
    assert [line["path"] for line in read_lines(path)] == [str(path)]
    path.write_text('{"stage": 1}\n{"stage": 2}\n')
    with pytest.raises(ValueError, match="line 1 is not one of this benchmark"):
        read_lines(path)


def test_lines_go_on_behind_one_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"stage": "env", "ca')
    Journal(path, "b").write("env", "card", "done")
    assert [line["case"] for line in read_lines(path)] == ["card"]


def test_every_line_says_of_which_build_and_card_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    first = Journal(path, "a", origin={"build": "1", "card": "A card"})
    first.write("kernels", "one", "done", {"ms": 1.5})
    assert (read_lines(path)[0]["build"], read_lines(path)[0]["card"]) == ("1", "A card")
    Journal(path, "b", origin={"build": "2", "card": "A card"}).check_card()
    with pytest.raises(ValueError, match="has lines of A card, this is Another: name another file"):
        Journal(path, "c", origin={"build": "1", "card": "Another"}).check_card()
