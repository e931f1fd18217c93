"""What people see of an evaluation: tables, pictures, the command line."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from cluster.cli.main import main
from cluster.tools.assets import needle_dir
from cluster.tools.eval.plots import draw
from cluster.tools.eval.tables import failures, print_report, strip
from protos.errors import UserError
from tests.support.paths import ROOT

MODES = ("plain", "yarn", "dca", "sparse")


def needle_report(lengths: list[int], modes: tuple[str, ...] = MODES, needles: int = 8) -> dict[str, Any]:
    cells: list[dict[str, Any]] = []
    for mode in modes:
        for length in lengths:
            outcomes = [{"right": mode != "plain" or index > 2, "depth": index / needles} for index in range(needles)]
            cells.append({
                "mode": mode, "length": length, "trial": 0, "total": needles, "outcomes": outcomes,
                "right": sum(outcome["right"] for outcome in outcomes), "ttft_s": 1.25, "prefill_tokens_per_s": 5000.0,
            })  # fmt: skip
            if mode == "sparse":
                cells[-1]["attention"] = {"density": 0.2, "held_out_recall": 0.97}
    return {
        "what": "needle", "model": "some-model", "form": "answer", "shared_words": True, "needles": needles,
        "trials": 1, "lengths": lengths, "modes": {mode: {} for mode in modes}, "complete": True, "cells": cells,
    }  # fmt: skip


def recall_report(layers: int, heads: int) -> dict[str, Any]:
    share = [[(layer + head) / (layers + heads) for head in range(heads)] for layer in range(layers)]
    names = ("density", "estimated_recall", "held_out_recall", "held_out_recall_min", "dense_share")
    variant = {
        "name": "sparse", "same_top1": 63, "logit_error_max": 0.0125, "kl_mean": 0.00031, "prefill_s": 3.0,
        "heads": dict.fromkeys(names, share),
    }  # fmt: skip
    int8 = {key: value for key, value in variant.items() if key != "heads"} | {"name": "int8 KV"}
    return {
        "what": "recall", "model": "some-model", "text": "book", "tokens": 65536, "next": 64,
        "reference": {"prefill_s": 9.0}, "variants": [variant, int8],
    }  # fmt: skip


def printed(report: dict[str, Any], width: int = 100) -> str:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width))
    return out.getvalue()


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


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


@pytest.mark.parametrize(
    ("lengths", "modes", "needles"), [([4096], ("plain",), 1), ([1 << n for n in range(10, 21)], MODES, 100)]
)
def test_needle_pictures(tmp_path: Path, lengths: list[int], modes: tuple[str, ...], needles: int) -> None:
    path = tmp_path / "x.png"
    draw(needle_report(lengths, modes, needles), path)
    width, height = size_of(path)
    assert width == pytest.approx(150 * (max(2.4, 0.62 * len(lengths) + 0.6) * len(modes) + 2.0), abs=2)
    assert height == pytest.approx(150 * max(3.6, 0.28 * needles + 2.0), abs=2)


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (4, 4), (48, 32)])
def test_recall_pictures(tmp_path: Path, layers: int, heads: int) -> None:
    path = tmp_path / "x.png"
    draw(recall_report(layers, heads), path)
    width, height = size_of(path)
    assert width == pytest.approx(150 * (3 * max(2.4, 0.16 * heads + 0.8) + 1.6), abs=2)
    assert height == pytest.approx(150 * max(3.6, 0.16 * layers + 2.0), abs=2)


def test_missing_cells_are_drawn_grey(tmp_path: Path) -> None:
    report = needle_report([4096, 8192], ("plain", "dca"))
    report["cells"] = report["cells"][:1]
    draw(report, tmp_path / "x.png")
    assert size_of(tmp_path / "x.png")[0] > 0
    dense = recall_report(2, 2)
    dense["variants"] = dense["variants"][1:]
    with pytest.raises(UserError, match="nothing to draw"):
        draw(dense, tmp_path / "y.png")


def test_matplotlib_is_optional(tmp_path: Path) -> None:
    """Without it one clear line; and nothing of the command line imports it before it draws."""
    (tmp_path / "x.json").write_text(json.dumps(needle_report([4096])))
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "from cluster.cli.main import main\n"
        "try: main(['eval', 'show', sys.argv[1]])\n"
        "finally: assert 'matplotlib' not in sys.modules"
    )
    root = ROOT
    command = [sys.executable, "-c", code, str(tmp_path / "x.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == 2
    assert "8/8" in done.stdout  # the table comes all the same
    assert done.stderr == "longreach: error: picture: needs matplotlib: pip install 'longreach[eval]'\n"


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def test_show_prints_and_draws_a_result(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(needle_report([4096])))
    done = invoke("show", path)
    assert done.exit_code == 0, done.output
    assert size_of(tmp_path / "eval.png")[0] > 0
    assert invoke("show", path, "--picture", tmp_path / "other.png").exit_code == 0
    assert (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["needle", "--lengths", "4K,x"], "must be a whole number such as 4096"),
        (["needle", "--lengths", ""], "must be a whole number such as 4096"),
        (["needle", "--modes", "plain,fast"], "--modes: fast: must be among plain, yarn, dca, sparse"),
        (["needle", "--model", "/nowhere"], "--model: /nowhere: must be a directory with config.json"),
        (["needle", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["needle", "--set", "sparse.cell"], "must be KEY=VALUE"),
        (["needle", "--set", "sparse.cell=[", "--modes", "plain"], "is not YAML"),
        (["needle", "--set", "sparse.size=1", "--lengths", "1K"], "sparse.size"),
        (["needle", "--depths", "0"], "0 is not in the range"),
        (["needle", "--lengths", "300", "--depths", "8"], "total_tokens"),
        (["recall", "--no-sparse"], "--no-sparse: leaves nothing to compare: add --kv int8"),
        (["recall", "--document", str(needle_dir() / "words.json")], "--tokens: 65536: the document has 1"),
        (["recall", "--document", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
        (["show", "/nowhere.json"], "/nowhere.json: cannot be read"),
    ],
)
def test_input_that_cannot_be_used(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


def test_every_option_of_every_evaluation_has_help() -> None:
    group = main.commands["eval"]
    assert isinstance(group, click.Group)
    assert set(group.commands) == {"needle", "recall", "show"}
    for verb in group.commands.values():
        assert verb.help
        assert all(isinstance(option, click.Argument) or option.help for option in verb.params), verb.name
