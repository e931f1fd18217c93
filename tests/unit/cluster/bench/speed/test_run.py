"""Rows of a run: what is written after each, seeds, progress."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.bench.speed.machine import LoadOfOthers, Mark
from cluster.bench.speed.run import Run
from cluster.bench.speed.settings import Bench, BenchSettings
from cluster.tools.display import Display


class Quiet(LoadOfOthers):
    def mark(self) -> Mark:
        return Mark(0.0, 0.0, 0.0)

    def since(self, mark: Mark) -> float:
        return 0.01


def run_of(write: Any = lambda report: None, **given: Any) -> tuple[Run, io.StringIO]:
    shown = io.StringIO()
    settings = BenchSettings.model_validate({"bench": "prefill", "config": Path("/x.yaml"), "repeats": 2, **given})
    display = Display(Console(file=shown, width=200))
    return Run(Bench("speed.yaml", settings), display, write, total=3, load=Quiet(2)), shown


def test_every_row_is_written_and_the_end_is_marked():
    written: list[dict[str, Any]] = []
    run, shown = run_of(lambda report: written.append(json.loads(json.dumps(report))))
    key = {"mode": "dense", "stages": 2, "shards": 1, "length": 4096}
    row = run.row(key, lambda number: {"first_token_s": 1.0 + number}, lambda: {"more": 5})
    assert (row["mode"], row["more"], row["repeats"], row["disturbed"]) == ("dense", 5, 2, 0)
    assert row["figures"]["first_token_s"]["median"] == 1.5
    run.finish()
    assert [(len(one["rows"]), one["complete"]) for one in written] == [(1, False), (1, True)]
    assert written[0]["what"] == "bench prefill"
    assert written[0]["config"]["file"] == "speed.yaml"
    assert written[0]["machine"]["cores"] >= 1
    assert "dense, 2 x 1, 4K tokens, repeat 2: rows: 0 of 3" in shown.getvalue()


def test_a_row_of_an_earlier_round_gets_further_repeats():
    written: list[dict[str, Any]] = []
    run, shown = run_of(lambda report: written.append(json.loads(json.dumps(report))))
    one, two = ({"mode": "dense", "stages": stages, "shards": 1, "length": 4096} for stages in (1, 2))
    for number in range(2):
        for key in (one, two):
            run.row(key, lambda number: {"first_token_s": 1.0 + number}, lambda number=number: {"round": number})
    assert [(row["stages"], row["repeats"], row["round"]) for row in run.report["rows"]] == [(1, 4, 1), (2, 4, 1)]
    assert [entry["first_token_s"] for entry in run.report["rows"][0]["runs"]] == [1.0, 2.0, 3.0, 4.0]
    assert run.report["rows"][0]["figures"]["first_token_s"]["median"] == 2.5
    assert len(written) == 4
    assert "dense, 2 x 1, 4K tokens, repeat 4: rows: 2 of 3" in shown.getvalue()


def test_no_two_prompts_begin_alike():
    run, _ = run_of()
    seeds = [run.seed(length, number) for length in (1, 2, 4096) for number in range(50)]
    seeds += [run.seed(length) for length in (1, 2, 4096)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 61 for seed in seeds)
    assert run.seed(7) == run_of()[0].seed(7) != run_of(seed=2)[0].seed(7)
