"""Pictures of evaluation results: their size, what is missing in them, and life without matplotlib."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.tools.eval.plots import draw
from protos.errors import UserError
from tests.support.data.eval_reports import MODES, needle_report, pinned_report, recall_report
from tests.support.paths import ROOT


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


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


def test_pinned_lengths_are_drawn_as_lines(tmp_path: Path) -> None:
    report = pinned_report()
    draw(report, tmp_path / "x.png")
    assert size_of(tmp_path / "x.png") == (960, 660)
    report["pinned"] = [entry for entry in report["pinned"] if not entry["sparse"]]
    draw(report, tmp_path / "y.png")


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
