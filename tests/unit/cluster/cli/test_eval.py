"""`longreach eval` without a cluster: result files shown again, input that cannot be used, help."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from cluster.cli.eval import Counts, Setting
from cluster.cli.main import main
from cluster.tools.assets import needle_dir
from tests.support.data.eval_reports import needle_report, ruler_report


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, arguments)])


def test_show_prints_and_draws_a_result(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(needle_report([4096])))
    done = invoke("show", path)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")
    assert invoke("show", path, "--picture", tmp_path / "other.png").exit_code == 0
    assert (tmp_path / "other.png").exists()


def test_show_merges_results(tmp_path: Path) -> None:
    paths = [tmp_path / f"{length}.json" for length in (4096, 16384)]
    for path in paths:
        path.write_text(json.dumps(ruler_report([int(path.stem)])))
    done = invoke("show", *paths, "--name", "A-Model")
    assert done.exit_code == 0, done.output
    assert "A-Model, 4 samples" in done.output
    assert "replaced" not in done.output
    assert "16K" in done.output
    assert (tmp_path / "4096-merged.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "4096.png").exists()
    done = invoke("show", *paths, paths[0], "--picture", tmp_path / "x.svg")
    assert "sparse 4K: 2 cells of 4096.json replaced by 4096.json" in done.output
    assert "<svg" in (tmp_path / "x.svg").read_text()
    paths[1].write_text(json.dumps(ruler_report([16384]) | {"model": "other"}))
    done = invoke("show", *paths)
    assert done.exit_code == 2
    assert done.output.strip().endswith("16384.json: model: other: must be that of 4096.json, which is some-model")
    assert len(done.output.strip().splitlines()) == 1
    assert "must end with .png or .svg" in invoke("show", paths[0], "--picture", tmp_path / "x.pdf").output


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
        (["recall", "--pinned", "1.2y"], "--pinned: '1.2y': must be a factor as 1.25x, a length as 256K, or max"),
        (["recall", "--tokens", "1K", "--pinned", "1000"], "--pinned: 1000: 1000 tokens: must be 1024 (--tokens) to"),
        (
            ["recall", "--tokens", "1K", "--positions", "plain", "--pinned", "2x"],
            "these positions have no length scale",
        ),
        (["recall", "--document", str(needle_dir() / "words.json")], "--tokens: 65536: the document has 1"),
        (["recall", "--document", "/nowhere.txt"], "/nowhere.txt: cannot be read"),
        (["ruler", "--tasks", "vt,qa_1"], "--tasks: qa_1: must be different names among niah_single_1"),
        (["ruler", "--modes", "plain", "--lengths", "100", "--tasks", "cwe"], "--lengths: 100: cwe needs at least"),
        (["ruler", "--resume", "/nowhere.json", "--lengths", "1K"], "/nowhere.json: cannot be read"),
        (["ruler", "--samples", "0"], "0 is not in the range"),
        (["show", "/nowhere.json"], "/nowhere.json: cannot be read"),
    ],
)
def test_input_that_cannot_be_used(arguments: list[str], message: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert message in done.output.replace("\n", " ")


def test_samples_are_exported(tmp_path: Path) -> None:
    done = invoke("ruler", "--export", tmp_path / "new", "--lengths", "1K", "--tasks", "vt, cwe", "--samples", "2")
    assert done.exit_code == 0, done.output
    assert "4 samples: " in done.output
    lines = (tmp_path / "new" / "1024" / "cwe" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]


def test_every_option_of_every_evaluation_has_help() -> None:
    group = main.commands["eval"]
    assert isinstance(group, click.Group)
    assert set(group.commands) == {"needle", "recall", "ruler", "show"}
    for verb in group.commands.values():
        assert verb.help
        assert all(isinstance(option, click.Argument) or option.help for option in verb.params), verb.name


def test_values_of_options() -> None:
    assert Counts().convert("4K, 16k", None, None) == (4096, 16_000)
    assert Counts().convert((1, 2), None, None) == (1, 2)
    for text, value in [
        ("sparse.cell=2K", ("sparse.cell", "2K")), ("a.b=0.99", ("a.b", 0.99)), ("a=off", ("a", False)),
        ("a=", ("a", None)),
        ("a={b: 1}", ("a", {"b": 1})), (" a = x=y", ("a", "x=y")), ("a=010", ("a", "010")),
    ]:  # fmt: skip
        assert Setting().convert(text, None, None) == value
