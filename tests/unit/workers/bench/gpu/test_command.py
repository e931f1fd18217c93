"""The whole benchmark of GPUs as a rehearsal, on a machine with torch, numpy and Triton alone; and wrong requests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT
from workers.bench.__main__ import main
from workers.bench.gpu.command import STAGES
from workers.bench.gpu.journal import read_lines
from workers.bench.gpu.show import show

_BARE = ["ray", "grpc", "google.protobuf", "safetensors", "pydantic", "psutil", "transformers", "tokenizers", "yaml"]
_SITE = "import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n"  # read by every child at its start
_TIMES = ("ms", "low", "high", "tflops", "gbs", "seconds", "tokens_s", "step_s", "ms_a_token", "wall_s", "of_matmul")


@pytest.mark.slow
def test_every_stage_runs_to_its_end_in_a_rehearsal(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="kernels are interpreted")
    path = tmp_path / "x.jsonl"
    (tmp_path / "sitecustomize.py").write_text(_SITE.format(blocked=_BARE))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "workers.bench", "gpu", "--rehearse", "--out", str(path)]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False
    )  # fmt: skip
    lines = read_lines(path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{[line for line in lines if 'error' in line]}"
    finished = [line for line in lines if line["state"] == "done"]
    assert {line["stage"] for line in finished} == set(STAGES)
    assert len(finished) >= 40
    for line in lines:
        assert line["rehearsal"] is True
        assert [line[name] for name in _TIMES if line.get(name) is not None] == []
        for parts in ("parts_s", "parts_ms"):
            assert set(line.get(parts, {}).values()) <= {None}
    by_name = {(line["stage"], line["case"]): line for line in finished}
    sparse = by_name["prefill", "100 sparse, int8 KV"]
    assert {"attention", "estimate", "selection", "recall", "staging", "experts", "rest"} <= set(sparse["parts_s"])
    assert 0 < sparse["density"] <= 1
    assert sparse["missing"] == []
    shares = [line["share"] for line in finished if line["case"].startswith("vertical-slash") and "share" in line]
    assert len(shares) >= 4
    assert all(0 < share <= 1 for share in shares)
    again = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert (again.returncode, len(read_lines(path))) == (0, len(lines)), "nothing is done twice"
    assert next(show(path)).startswith("REHEARSAL")


def test_the_command_needs_neither_grpc_nor_generated_code() -> None:
    code = (
        "import sys; from pathlib import Path; import torch\n"
        "from workers.bench.gpu.command import all_cases, STAGES; from workers.bench.gpu.context import Context\n"
        "from workers.bench.gpu.journal import Journal\n"
        "cases = list(all_cases(Context(Journal(Path('x'), 'x'), torch.device('cuda'), 0.0), STAGES))\n"
        "print(len(cases), [m for m in sys.modules if m.split('.')[0] in ('ray', 'grpc') or '_pb2' in m])"
    )
    pytest.importorskip("triton")
    count, _, loaded = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).partition(" ")
    assert int(count) > 100
    assert loaded.strip() == "[]"


@pytest.mark.parametrize(("arguments", "message"), [
    (["kernel", "--out", "x"], "STAGE: 'kernel': must be one of env"),
    (["env"], "--out: name a file"),
    (["env", "--out", "/none/x"], "its folder does not exist"),
    (["--out", "x", "--minutes", "0"], "--minutes: 0: must be above 0"),
    (["--show", "/none/x"], "--show: /none/x: no lines"),
    (["--cards", "/none/x"], "needs the lines of the stages env and tune"),
])  # fmt: skip
def test_wrong_requests_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_a_rehearsal_is_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path / "x.jsonl")]) == 2
    assert "torch finds no GPU here; --rehearse" in capsys.readouterr().err
