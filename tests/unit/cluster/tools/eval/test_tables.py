"""Tables of evaluation results, as a terminal shows them."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from cluster.tools.eval.tables import depth_scores, failures, print_report, strip
from tests.support.data.eval_reports import needle_report, pinned_report, recall_report

EVIL = "a\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\u200b\nforged [bold]"
DANGER = ("\x1b]", "\x07", "\x1b[31m", "\x9b", "\u202e", "\u200b")


def printed(report: dict[str, Any], width: int = 100) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def test_needle_table() -> None:
    lines = printed(needle_report([4096, 65536])).splitlines()
    assert " ".join(lines[1].split()) == "attention tokens right by depth first token prefill density recall"
    assert lines[2].split() == ["plain", "4K", "5/8", "···█████", "1.2", "s", "5,000/s"]
    assert lines[9].split() == ["sparse", "64K", "8/8", "████████", "1.2", "s", "5,000/s", "20%", "97%"]


def test_failed_cells_are_named_whole() -> None:
    report = needle_report([4096], ("dca",)) | {"complete": False}
    report["cells"] = [{"mode": "dca", "length": 4096, "trial": 0, "total": 8, "error": "stage 0 [rank 1]\n is gone"}]
    assert failures(report) == ["dca 4K: stage 0 [rank 1] is gone"]
    text = printed(report)
    assert "failed: dca 4K: stage 0 [rank 1] is gone" in text
    assert "not finished" in text


@pytest.mark.parametrize(("scores", "bars"), [([1.0, 0.0, None], "█·?"), ([0.5, 0.01, 0.99], "▅▁█"), ([], "")])
def test_strip(scores: list[float | None], bars: str) -> None:
    assert strip(scores) == bars


def test_recall_table_fits_a_terminal() -> None:
    report = recall_report(4, 4)
    report["variants"].append(report["variants"][0] | {"name": "sparse, int8 KV"})
    lines = printed(report, 80).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "dense sparse int8 KV sparse, int8 KV" in text
    assert "same next token 63/64 63/64 63/64" in text
    assert "largest logit error 0.013 0.013 0.013\nmean KL, nats 0.00031" in text
    assert "prefill 9.0 s 3.0 s 3.0 s 3.0 s\npairs visited 100% 38% 100% 38%" in text
    assert "lowest recall L0 H0 0.0% L0 H0 0.0%" in text


def test_scores_by_depth_are_means_over_trials() -> None:
    report = needle_report([4096], ("plain",), 4)
    assert depth_scores(report, "plain", 4096) == [0.0, 0.0, 0.0, 1.0]
    second = report["cells"][0] | {"trial": 1, "outcomes": [{"right": True}] * 4}
    report["cells"].append(second)
    assert depth_scores(report, "plain", 4096) == [0.5, 0.5, 0.5, 1.0]
    assert depth_scores(report, "dca", 4096) == [None] * 4


def test_names_in_a_report_stay_text() -> None:
    needles = needle_report([4096], (EVIL,)) | {"model": EVIL}
    failed = {"mode": EVIL, "length": 4096, "trial": 0, "total": 8, "error": EVIL}
    needles["cells"].append(failed)
    recall = recall_report(2, 2) | {"model": EVIL, "text": EVIL}
    recall["variants"][0]["name"] = EVIL
    for report in (needles, recall):
        text = printed(report, 300)
        assert [sign for sign in DANGER if sign in text] == []
        assert not any(line.startswith("forged") for line in text.splitlines())
        assert "forged [bold]" in text


def test_pinned_lengths_have_a_line_each() -> None:
    report = pinned_report()
    lines = printed(report, 90).splitlines()
    assert max(map(len, lines)) <= 90
    text = "\n".join(" ".join(line.split()) for line in lines)
    assert "68813 dense x 1.0688 63/64 0.02 0.01 0.0004" in text
    assert "128K sparse x 1.1311 63/64 0.02 0.01 0.0004" in text
    assert "recall: attention mass" in text
    assert "recall: attention mass" not in printed(report | {"variants": []})
