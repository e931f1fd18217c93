"""`longreach bench` without a cluster: what is refused before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cluster.cli.main import main
from tests.support.paths import ROOT


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


@pytest.mark.parametrize("verb", ["prefill", "decode", "scaling", "compare"])
def test_a_checkpoint_that_is_missing_is_named_with_the_way_out(verb: str, tmp_path: Path):
    done = run(verb, "--model", tmp_path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert str(tmp_path) in done.output
    assert "workers.bench make-checkpoint" in done.output
    assert not (tmp_path / "out").exists()


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    done = run("decode", ROOT / "configs" / "bench" / "prefill.yaml", "--out", tmp_path)
    assert done.exit_code == 2
    assert "bench: prefill: must be decode here, or use `bench prefill`" in done.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "repeats=0"], "repeats: 0: must be a whole number from 1 to 1000"),
        (["--set", "layouts=[[9, 1]]"], "cluster.pipeline_parallel_size: 9"),
        (["--set", "settings={model.max_length: 5}"], "model.max_length: 5: unknown key"),
        (["--lengths", "4K,many"], "many"),
    ],
)
def test_settings_that_cannot_be_used_start_nothing(arguments: list[str], expected: str, tmp_path: Path):
    done = run("prefill", "--out", tmp_path, *arguments)
    assert done.exit_code == 2
    assert expected in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gguf", "x.gguf"], "--gguf: is for llama.cpp: name --llama-server too"),
        (["--url", "host:8000"], "peers.server.url: host:8000: must be a URL such as http://host:8000/v1"),
        (["--set", "peers={x: {kind: openai}}"], "peers.x.url: (missing): required for kind openai"),
    ],
)
def test_peers_that_cannot_be_used_start_nothing(arguments: list[str], expected: str, tmp_path: Path):
    done = run("compare", "--out", tmp_path, *arguments)
    assert done.exit_code == 2
    assert expected in done.output
    assert list(tmp_path.iterdir()) == []


def test_every_verb_has_help():
    for verb in ("prefill", "decode", "scaling", "compare"):
        done = run(verb, "--help")
        assert done.exit_code == 0
        assert "--repeats" in done.output
