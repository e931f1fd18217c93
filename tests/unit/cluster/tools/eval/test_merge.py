"""Several results of `longreach eval ruler` as one report."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.tools.eval.merge import merge
from cluster.tools.eval.ruler.tables import average, cost_of_sparse, questions_of, result
from cluster.tools.eval.tables import print_report
from protos.errors import UserError
from tests.support.data.eval_reports import needle_report, ruler_report


def shared_report(length: int, modes: tuple[str, ...] = ("dca", "sparse")) -> dict[str, Any]:
    """Two haystacks, each with two questions of two tasks: all are right in the first, none in the second."""
    cells = [
        {"mode": mode, "task": "vt+cwe", "length": length, "haystack": at, "outcomes": [
            {"task": task, "score": 1.0 - at} for task in ("vt", "vt", "cwe", "cwe")]}
        for mode in modes for at in (0, 1)
    ]  # fmt: skip
    note = "questions: 2 a haystack; not RULER's own samples"
    return ruler_report([length], modes=modes) | {"questions": 2, "note": note, "cells": cells}


def printed(report: dict[str, Any]) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=140))
    return out.getvalue()


def test_lengths_and_modes_come_together() -> None:
    late = ruler_report([16384], modes=("dca", "sparse"))
    early = ruler_report([4096], modes=("plain", "dca"))
    report, replaced = merge([("a", late), ("b", early)])
    assert replaced == []
    assert report["lengths"] == [4096, 16384]
    assert list(report["modes"]) == ["dca", "sparse", "plain"]
    assert len(report["cells"]) == len(late["cells"]) + len(early["cells"])
    assert not report["complete"]  # sparse at 4K, plain at 16K
    assert (report["notes"], "note" in report) == ([], False)
    assert result(report, "sparse", 16384, "vt") == result(late, "sparse", 16384, "vt")
    assert merge([("a", late)])[0]["complete"]


def test_the_later_of_two_cells_counts() -> None:
    first, second = ruler_report([4096]), ruler_report([4096], modes=("sparse",))
    for cell in second["cells"]:
        cell["outcomes"] = [{"score": 0.5}] * 4
    report, replaced = merge([("a.json", first), ("b.json", second)])
    assert replaced == ["sparse 4K: 2 cells of a.json replaced by b.json"]
    assert result(report, "sparse", 4096, "vt") == pytest.approx((0.5, 0.15, 0.85), abs=1e-2)
    assert report["complete"]
    report, replaced = merge([("b.json", second), ("a.json", first)])
    assert replaced == ["sparse 4K: 2 cells of b.json replaced by a.json"]
    assert len(report["cells"]) == len(first["cells"])


def test_a_failed_cell_replaces_failed_ones_only() -> None:
    failed = ruler_report([4096], modes=("dca",))
    failed["cells"] = [{"mode": "dca", "task": "vt", "length": 4096, "error": "gone"}]
    whole = ruler_report([4096], modes=("dca",))
    for files in ([whole, failed], [failed, whole]):
        assert merge([("a", files[0]), ("b", files[1])])[0]["complete"]
    report, replaced = merge([("a", failed), ("b", failed)])
    assert [cell["error"] for cell in report["cells"]] == ["gone"]
    assert replaced == ["dca 4K: 1 cell of a replaced by b"]


def test_haystacks_with_more_questions_keep_their_intervals() -> None:
    alone, shared = ruler_report([4096]), shared_report(65536)
    report, _ = merge([("a", alone), ("b", shared)])
    assert [questions_of(report, "dca", length) for length in (4096, 65536)] == [1, 2]
    assert result(report, "dca", 65536, "vt") == result(shared, "dca", 65536, "vt")
    assert average(report, "dca", 65536) == average(shared, "dca", 65536)
    assert average(report, "dca", 4096) == average(alone, "dca", 4096)
    note = "questions: 1 a haystack at 4K; 2 a haystack at 64K, not RULER's own samples"
    assert report["note"] == note
    assert note in printed(report)
    assert merge([("b", shared), ("c", shared_report(4096))])[0]["note"] == shared["note"]


def test_other_questions_replace_all_of_a_mode_and_length() -> None:
    report, replaced = merge([("a", ruler_report([4096])), ("b", shared_report(4096, ("dca",)))])
    assert replaced == ["dca 4K: 2 cells of a replaced by b"]
    assert len(result(report, "dca", 4096, "vt") or ()) == 3
    assert cost_of_sparse(report) == []  # sparse was asked other samples
    shared = shared_report(4096, ("dca",))
    shared["cells"] = [{"mode": "dca", "task": "vt+cwe", "length": 4096, "haystack": 0, "error": "gone"}]
    report, replaced = merge([("a", ruler_report([4096])), ("b", shared)])
    assert replaced == []
    assert report["complete"]


def test_settings_that_differ_are_named() -> None:
    sparse = "above 0 tokens, cells of {}, last 64"
    files = []
    for length, factor, cell in ((4096, 4.0, 8192), (16384, 4.0, 1024), (65536, 16.0, 1024)):
        report = ruler_report([length], modes=("yarn", "sparse"))
        chunks = {"chunk_size": 4096, "local_size": 512}
        report["modes"] = {"yarn": {"rope": "yarn", "factor": factor}, "sparse": {
            "factor": 1.0, "dual_chunk": chunks, "sparse": sparse.format(cell)}}  # fmt: skip
        files.append((f"{length}.json", report))
    report, _ = merge(files)
    assert report["notes"] == [
        "yarn: factor 4 at 4K, 16K; 16 at 64K", "sparse: cells of 8192 at 4K; cells of 1024 at 16K, 64K",
    ]  # fmt: skip
    assert report["notes"][1] in printed(report)
    del files[2][1]["modes"]["sparse"]["dual_chunk"]
    assert "sparse: dual chunk chunk_size 4096, local_size 512 at 4K, 16K; none at 64K" in merge(files)[0]["notes"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "other\n", "b: model: other: must be that of a, which is some-model"),
        ("scoring", "lower", "b: scoring: lower: must be that of a, which is None"),
        ("tasks", ["vt"], r"b: tasks: \['vt'\]: must be that of a"),
        ("samples", 5, "b: samples: 5: must be that of a, which is 4"),
        ("seed", 1, "b: seed: 1"),
    ],
)
def test_other_models_and_samples_are_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        merge([("a", ruler_report([4096])), ("b", ruler_report([16384]) | {key: value})])


def test_other_evaluations_are_refused() -> None:
    with pytest.raises(UserError, match="b: is of `longreach eval needle`: several files must all be of eval ruler"):
        merge([("a", ruler_report([4096])), ("b", needle_report([4096]))])
