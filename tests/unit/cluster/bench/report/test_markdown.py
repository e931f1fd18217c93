"""The report as files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from cluster.bench.report.files import Result
from cluster.bench.report.markdown import write_report
from cluster.cli.main import main
from protos.errors import UserError
from tests.support.data.speed import bench_results

ALL = [
    Result(Path(f"{name}.json"), getattr(bench_results, name)())
    for name in ("prefill", "decode", "scaling", "compare", "recall")
]


def test_a_report_has_all_pictures_and_tables(tmp_path: Path):
    paths = write_report(ALL, tmp_path / "out", ("png", "svg"))
    text = paths[0].read_text()
    shown = re.findall(r"\]\(([^)]+)\)", text)
    assert shown == [
        "first-token.png", "decode.png", "efficiency.png", "throughput.png", "gantt-2x1-64K.png",
        "gantt-4x1-64K.png", "gantt-1x2-64K.png", "experts.png", "fit.png", "recall.png",
    ]  # fmt: skip
    for name in shown:
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out" / name).with_suffix(".svg").is_file()
    assert len(paths) == 1 + 2 * len(shown)
    assert "| 2 x 1 | 64K | 4.0 | 2.0 |" in text  # what links cost
    assert "| strong | dense | 4 x 1 * | 64K |" in text
    assert "| all; 20% |" in text


def test_a_part_of_the_results_makes_a_part_of_the_report(tmp_path: Path):
    paths = write_report(ALL[1:2], tmp_path)
    assert [path.name for path in paths] == ["report.md", "decode.png"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*cannot be made"):
        write_report(ALL, tmp_path / "file" / "out")


def test_the_verb_prints_the_files(tmp_path: Path):
    (tmp_path / "d.json").write_text(json.dumps(bench_results.decode()))
    done = CliRunner().invoke(
        main, ["bench", "report", str(tmp_path / "d.json"), "--out", str(tmp_path / "out"), "--json"]
    )
    assert done.exit_code == 0, done.output
    line = done.stdout.splitlines()[-1]
    assert [Path(path).name for path in json.loads(line)["files"]] == ["report.md", "decode.png"]
    done = CliRunner().invoke(main, ["bench", "report", str(tmp_path / "no.json"), "--out", str(tmp_path)])
    assert done.exit_code == 2
