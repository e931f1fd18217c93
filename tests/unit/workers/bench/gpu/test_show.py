"""The summary of a file: targets that are met, missed and not measured, cut runs, rehearsals."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.bench.gpu.command import all_cases
from workers.bench.gpu.context import Context
from workers.bench.gpu.journal import Journal
from workers.bench.gpu.show import TARGETS, show


def measured(path: Path, name: str = "NVIDIA H200", rehearsal: bool = False) -> str:
    journal = Journal(path, "a", rehearsal)
    smi = {"driver_version": "580", "power.limit": "700 W"}
    journal.write("env", "card", "done", {"name": name, "smi": smi, "commit": "abc", "build": "1", "packages": {}})
    journal.write("kernels", "dense own 1M D 128", "done", {"ms": 300.0, "tflops": 600.0, "of_matmul": 0.75})
    journal.write("kernels", "dense cudnn 1M D 128", "done", {"ms": 350.0, "tflops": 500.0})
    journal.write("kernels", "vertical-slash 1M, pattern 1", "done", {
        "ms": 30.0, "kernel_of_matmul": 0.5, "pattern": "nearest 16384 and 28 runs of 256", "share": 0.08,
        "parts_ms": {"kernel": 25.0},
    })  # fmt: skip
    journal.write("kernels", "estimate, selection, recall 1M", "done", {"ms": 7.0, "parts_ms": {"selection": 0.4}})
    journal.write("kernels", "staging 1M int8", "done", {"ms": 4.0, "of_copy": 0.8})
    journal.write("prefill", "1000000 sparse, int8 KV", "part", {"seconds": 50.0, "tokens": 500_000, "is_whole": False})
    journal.write("prefill", "1000000 sparse, int8 KV", "failed", {"error": "time of the call is over"})
    journal.write("prefill", "128K dense, bf16 KV", "done", {"seconds": 16.0, "is_whole": True})
    return "\n".join(show(path))


def line_of(text: str, what: str) -> str:
    return next(line for line in text.splitlines() if what in line)


def test_targets_are_met_missed_or_not_measured(tmp_path: Path) -> None:
    text = measured(tmp_path / "x.jsonl")
    assert text.startswith("NVIDIA H200, driver 580, limit 700 W, commit abc")
    targets = text[text.index("\ntargets") :]
    assert "0.75  MET, aim too" in line_of(targets, "dense own, 1M keys")
    assert line_of(targets, "as shipped").endswith("0.8333  MISSED")
    assert line_of(targets, "vertical-slash, pattern 1").endswith("0.5  MET")
    assert line_of(targets, "sparse with all costs").endswith("7.895  MET"), "300 / (30 + 7 + 4 / 4)"
    assert line_of(targets, "estimate, selection, recall").endswith("7  MISSED")
    assert line_of(targets, "selection alone").endswith("0.4  MET")
    assert line_of(targets, "prefill 128K dense").endswith("16  MET")
    assert line_of(targets, "prefill 1,000,000 sparse, int8").endswith("not measured")
    assert line_of(targets, "dense own, 64K").endswith("not measured")
    assert "nearest 16384 and 28 runs of 256" in text
    assert "prefill 1000000 sparse, int8 KV: time of the call is over; until then seconds 50" in text


def test_times_of_another_card_are_no_verdict(tmp_path: Path) -> None:
    text = measured(tmp_path / "x.jsonl", "NVIDIA A100")
    assert line_of(text, "prefill 128K dense, bf16 KV: s").endswith("16 (the target is for an NVIDIA H200)")
    assert "MET" in line_of(text, "vertical-slash, pattern 1, 1M keys")


def test_nothing_of_a_rehearsal_is_a_result(tmp_path: Path) -> None:
    text = measured(tmp_path / "x.jsonl", rehearsal=True)
    assert text.startswith("REHEARSAL")
    assert "MET" not in text
    assert text.count("not measured") == len(TARGETS)


def test_lines_of_two_builds_are_told_of(tmp_path: Path) -> None:
    """Also where the second call did not repeat the facts of the card, as they were there."""
    path = tmp_path / "x.jsonl"
    Journal(path, "a", origin={"build": "1"}).write("env", "card", "done", {"name": "A card"})
    assert "WARNING" not in "\n".join(show(path))
    Journal(path, "b", origin={"build": "2"}).write("kernels", "SwiGLU", "done", {"ms": 1.0})
    assert "WARNING: these lines come from 2 different builds" in "\n".join(show(path))


def test_an_empty_file_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no lines: run the benchmark with --out"):
        list(show(tmp_path / "x.jsonl"))


def test_targets_read_cases_that_exist(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    import torch

    context = Context(Journal(tmp_path / "x.jsonl", "a"), torch.device("cuda"), 0.0)
    known = {(case.stage, case.name) for case in all_cases(context, ("env", "kernels", "tune", "prefill", "decode"))}
    asked: set[tuple[str, str]] = set()

    class Asking(dict[tuple[str, str], dict[str, object]]):
        def get(self, key: tuple[str, str], default: object = None) -> dict[str, object]:  # type: ignore[override]
            asked.add(key)
            return {}

    for target in TARGETS:
        assert target.value(Asking()) is None
    assert asked <= known
    assert len(asked) >= 15
