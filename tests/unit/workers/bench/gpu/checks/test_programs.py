"""Checks that are programs: a group of one, what is sanitised, and output of programs that end, fail or are late."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from workers.bench.gpu.checks import kernels, programs, quantised, selection
from workers.bench.gpu.context import Context
from workers.bench.gpu.journal import Journal


def context_of(device: str, rehearsal: bool) -> Context:
    return Context(Journal(Path("unused"), "x", rehearsal), torch.device(device), time.monotonic() + 60)


def test_every_kernel_that_is_sanitised_has_such_a_check() -> None:
    pytest.importorskip("triton")
    context = context_of("cuda", False)
    known = {case.name for case in (*kernels.cases(context), *quantised.cases(), *selection.cases())}
    assert set(programs._SANITIZED) <= known


def test_checks_of_other_programs_say_why_they_did_not_run() -> None:
    context = context_of("cpu", True)
    found = {case.name: case.run(context) for case in programs.cases()}
    assert found["NCCL, one process"] == {"ok": True, "backend": "gloo"}
    assert found["tests/gpu"] == {"ok": None, "why": "a rehearsal"}
    assert found["compute-sanitizer"] == {"ok": None, "why": "a rehearsal"}


def test_output_of_a_program_is_kept_when_it_is_late() -> None:
    code, output = programs._run([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 60)
    assert (code, output.strip()) == (3, "x")
    late = "import time; print('begun', flush=True); time.sleep(600)"
    assert programs._run([sys.executable, "-c", late], 8) == (124, "begun\n")


@pytest.mark.parametrize("code", [0, 66])
def test_an_access_out_of_bounds_fails_though_all_results_are_right(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be done, and nothing would look again when it is mended."""
    said = [*(f"passed {name}" for name in programs._SANITIZED), "========= Invalid __global__ read of size 4 bytes"]
    program = tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in said[: None if code else -1]))
    with program.open("a") as file:
        file.write(f"exit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (check,) = (case for case in programs.cases() if case.name == "compute-sanitizer")
    if code:
        with pytest.raises(AssertionError, match=r"exit code 66 .* Invalid __global__ read"):
            check.run(context_of("cpu", False))
    else:
        found = check.run(context_of("cpu", False))
        assert isinstance(found, dict)
        assert (found["ok"], found["cases"]) == (True, list(programs._SANITIZED))
