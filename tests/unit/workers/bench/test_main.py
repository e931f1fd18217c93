"""The benchmark command: a bare machine, its options, its checkpoint writer."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT
from workers.bench.__main__ import length, main, parser
from workers.bench.checkpoint import write_checkpoint
from workers.bench.timing import measure, median_figure

_BARE = ["ray", "grpc", "google.protobuf", "safetensors", "pydantic", "psutil", "transformers", "tokenizers", "yaml"]
_RUNNER = """
import runpy, sys
for name in {blocked!r}:
    sys.modules[name] = None
sys.argv = ["bench", *{arguments!r}]
runpy.run_module("workers.bench", run_name="__main__")
"""


def _run_without(blocked: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = _RUNNER.format(blocked=blocked, arguments=arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def test_kernels_run_on_a_machine_with_only_torch_and_numpy(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    done = _run_without(_BARE, "--quick", "--threads", "1", "--date", "2030-01-01", "--json", str(path), "kernels")
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    where = result["environment"]
    assert where["date"] == "2030-01-01"
    assert where["torch"] == torch.__version__
    assert where["threads"] == 1
    assert where["cores"] >= 1
    assert where["cpu"]
    assert result["config"]["quick"] is True
    names = [figure["name"] for figure in result["figures"]]
    for kernel in (
        "attention", "torch SDPA", "experts", "rms_norm", "rotate", "linear", "all-reduce", "sampler", "frames",
    ):  # fmt: skip
        assert any(name.startswith(kernel) for name in names), kernel
    for figure in result["figures"]:
        assert figure["unit"] == "ms"
        assert 0 < figure["low"] <= figure["value"] <= figure["high"]


@pytest.mark.slow
def test_decode_needs_only_torch_and_numpy(tmp_path: Path) -> None:
    path = tmp_path / "decode.json"
    arguments = ("--quick", "--threads", "1", "--json", str(path), "decode", "--lengths", "100")
    done = _run_without(_BARE, *arguments)
    assert done.returncode == 0, done.stderr
    units = {figure["name"]: figure["unit"] for figure in json.loads(path.read_text())["figures"]}
    assert units == {"prefill 100": "tokens/s", "prefill 100, first run": "s", "decode at 100": "ms a token"}


@pytest.mark.slow
def test_rounds_answer_line_by_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", layers=1)
    command = [sys.executable, "-m", "workers.bench", "--threads", "1", "rounds", "--model", str(tmp_path / "model")]
    command += ["--lengths", "200", "--chunk", "64", "--tokens", "3"]
    lines = "decode\nprefill\ndecode\n"
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=True)
    before, prefill, after = map(float, done.stdout.split())
    assert 0 < min(before, after) <= max(before, after) < prefill


@pytest.mark.parametrize(("text", "tokens"), [("1", 1), ("4k", 4000), ("64K", 65536), ("1m", 10**6), ("2M", 1 << 21)])
def test_lengths(text: str, tokens: int) -> None:
    assert length(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "k", "-1", "1.5k", "3M", "4kk", "٤"])
def test_bad_lengths_name_the_range(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be a token count from 1 to 2M"):
        length(text)


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", str(tmp_path / "none" / "x.json"), "kernels"]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    assert main(["prefill", "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    if not torch.cuda.is_available():
        assert main(["--device", "cuda", "kernels"]) == 2
        assert "torch finds no GPU" in capsys.readouterr().err


def test_medians() -> None:
    calls = []
    seconds = measure(lambda: calls.append(1), torch.device("cpu"), repeats=3, warm_up=2)
    assert len(seconds) == 3
    assert len(calls) == 5
    figure = median_figure("x", [3.0, 1.0, 2.0], "s")
    assert (figure.value, figure.low, figure.high, figure.repeats) == (2.0, 1.0, 3.0, 3)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("kernels", (None, "bfloat16", False)),
        ("--threads 3 --quick kernels", (3, "bfloat16", True)),
        ("kernels --threads 3 --dtype float32", (3, "float32", False)),
        ("--threads 2 --dtype float32 kernels --threads 3 --quick", (3, "float32", True)),
    ],
)
def test_common_options_stand_before_or_after_what(line: str, expected: tuple[int | None, str, bool]) -> None:
    options = parser().parse_args(line.split())
    assert (options.threads, options.dtype, options.quick) == expected
