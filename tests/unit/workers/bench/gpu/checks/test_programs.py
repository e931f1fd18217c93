"""Checks that are programs: a group of one, what is sanitised, and output of programs that end, fail or are late."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

from workers.bench.gpu.checks import kernels, programs, selection
from workers.bench.gpu.context import Context
from workers.bench.gpu.journal import Journal


def context_of(device: str, rehearsal: bool) -> Context:
    return Context(Journal(Path("unused"), "x", rehearsal), torch.device(device), time.monotonic() + 60)


def test_every_kernel_that_is_sanitised_has_such_a_check() -> None:
    pytest.importorskip("triton")
    known = {case.name for case in (*kernels.cases(context_of("cuda", False)), *selection.cases())}
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
