"""`longreach eval` through a real cluster on tiny grids."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.integration.conftest import CommandLine


@pytest.mark.parametrize("form", ["answer", "prompt"])
def test_a_tiny_grid(longreach: CommandLine, tmp_path: Path, form: str) -> None:
    done = longreach(
        "eval", "needle", "--lengths", "1K,2K", "--depths", 4, "--modes", "plain", "--form", form, "--out", tmp_path
    )
    assert done.code == 0, done.err
    (result,) = tmp_path.glob(f"eval-needle-needle-{form}-*.json")
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(result.read_text())
    assert report["complete"]
    assert [(cell["length"], cell["right"], cell["total"]) for cell in report["cells"]] == [(1024, 4, 4), (2048, 4, 4)]
    for cell in report["cells"]:
        assert cell["cached_tokens"] > 2.5 * (cell["prompt_tokens"] - 128)  # three of four questions found the pages
    assert report["environment"]["cpu"]
    rows = [line.split()[:3] for line in done.out.splitlines()]
    assert ["plain", "1K", "4/4"] in rows
    assert ["plain", "2K", "4/4"] in rows
    longreach.assert_nothing_left()


def test_sparse_prefill_finds_what_it_is_asked_for(longreach: CommandLine, tmp_path: Path) -> None:
    """Two modes are two clusters; the sparse one says what it visited and kept."""
    done = longreach(
        "eval", "needle", "--lengths", "6K", "--depths", 4, "--modes", "dca,sparse", "--form", "prompt", "--json",
        "--no-picture", "--out", tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads(done.out)
    dense, sparse = report["cells"]
    assert dense["right"] == sparse["right"] == 4
    assert "attention" not in dense
    assert 0.0 < sparse["attention"]["density"] <= 1.0
    assert 0.5 < sparse["attention"]["held_out_recall"] <= 1.0
    assert report["modes"]["sparse"]["dual_chunk"] == report["modes"]["dca"]["dual_chunk"]
    longreach.assert_nothing_left()


def test_an_interrupted_evaluation_keeps_its_results(longreach: CommandLine, tmp_path: Path) -> None:
    process = longreach.start(
        "eval", "needle", "--lengths", "1K,64K", "--depths", 2, "--modes", "yarn", "--out", tmp_path
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("yarn 64K: reading"):
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "not finished" in out
    (result,) = tmp_path.glob("*.json")
    assert [cell["length"] for cell in json.loads(result.read_text())["cells"]] == [1024]
    longreach.assert_nothing_left()


def test_tasks_over_modes(longreach: CommandLine, tmp_path: Path) -> None:
    """The shipped checkpoint knows none of these tasks; what counts is that every cell has answers and a score."""
    options = ["eval", "ruler", "--lengths", "1K", "--tasks", "niah_single_1,qa_synthetic", "--samples", 2]
    done = longreach(*options, "--modes", "plain,yarn", "--max-tokens", 12, "--out", tmp_path)
    assert done.code == 0, done.err
    (result,) = tmp_path.glob("eval-ruler-needle-*.json")
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(result.read_text())
    assert report["complete"]
    assert [(cell["mode"], cell["task"]) for cell in report["cells"]] == [
        (mode, task) for mode in ("plain", "yarn") for task in ("niah_single_1", "qa_synthetic")
    ]
    for cell in report["cells"]:
        assert len(cell["outcomes"]) == cell["samples"] == 2
        assert 1024 - 12 - 90 <= cell["prompt_tokens"] <= 1024 - 12
        low, high = cell["interval"]
        assert low <= cell["score"] <= high
    assert any(line.split()[:2] == ["average", "1K"] for line in done.out.splitlines())
    again = longreach(*options, "--modes", "plain,yarn", "--max-tokens", 12, "--resume", result, "--no-picture")
    assert again.code == 0, again.err
    assert json.loads(result.read_text())["cells"] == report["cells"]  # nothing was run again
    longreach.assert_nothing_left()
