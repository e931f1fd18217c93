"""Stage `checks`, programs: the tests of tests/gpu, compute-sanitizer over one case a kernel, and a group of NCCL."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Line
from workers.transport.groups import make_group

ROOT = Path(__file__).resolve().parents[4]
_TESTS_S, _SANITIZER_S = 240, 240
_SANITIZED = (  # one case a kernel, the smallest
    "staging int8, D 64", "dense own int8, D 64", "vertical-slash int8, 128 rows, D 64", "decode int8", "heads int8",
    "joined parts", "experts", "routing and sorting", "rows", "greedy choice", "codes of activations", "products int4",
    "products int8", "products float8_e4m3", "estimate", "thresholds and compaction", "selection and recall",
    "adaptive budgets",
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Yield the cases."""
    yield Case("checks", "NCCL, one process", _nccl, 10, 60)
    yield Case("checks", "tests/gpu", _tests, 60, _TESTS_S + 20)
    yield Case("checks", "compute-sanitizer", _sanitizer, 90, _SANITIZER_S + 20)


def _nccl(context: Context) -> Line:
    """Add up a tensor in a group of one, over gloo on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        group = make_group(store, 0, 1, context.device, 30.0)
        tensor = torch.arange(1000.0, device=context.device)
        group.allreduce([tensor]).wait()
        context.synchronize()
        right = torch.equal(tensor.cpu(), torch.arange(1000.0))
        del group
    if not right:
        raise AssertionError("a sum over one process changed the tensor")
    return {"ok": True, "backend": "nccl" if context.device.type == "cuda" else "gloo"}


def _run(command: Sequence[str], limit_s: float, **environment: str) -> tuple[int, str]:
    """Return exit code and output of a program that may use the GPU beside this process; 124 at the limit."""
    settings = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=limit_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return 124, output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def _tests(context: Context) -> Line:
    """Run tests/gpu where pytest is; without the settings of the repository, whose plugins may be missing."""
    if importlib.util.find_spec("pytest") is None or not (ROOT / "tests" / "gpu").is_dir():
        return {"ok": None, "why": "pytest or tests/gpu is not here"}
    if context.rehearsal:
        return {"ok": None, "why": "a rehearsal"}
    limit = min(_TESTS_S, context.left() - 5)
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    code, output = _run([*command, "tests/gpu"], limit)
    if code:
        raise AssertionError(f"exit code {code}: {output[-1200:]}")
    return {"ok": True, "summary": output.strip().splitlines()[-1]}


def _sanitizer(context: Context) -> Line:
    """Look for accesses out of bounds in one case of every kernel, in a process of its own."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if context.rehearsal or not Path(path).exists():
        return {"ok": None, "why": "a rehearsal" if context.rehearsal else "there is no compute-sanitizer"}
    limit = min(_SANITIZER_S, context.left() - 5)
    code = f"from workers.bench.gpu.checks.programs import run_sanitized; run_sanitized({_SANITIZED!r})"
    options = ["--tool", "memcheck", "--error-exitcode", "66", "--print-limit", "10"]
    options += ["--report-api-errors", "no"]  # calls of torch that may fail, such as those that ask what is there
    command = [path, *options, sys.executable, "-c", code]
    status, output = _run(command, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1", PYTORCH_CUDA_ALLOC_CONF="")
    lines = output.strip().splitlines()
    passed = [line.removeprefix("passed ") for line in lines if line.startswith("passed ")]
    if status:
        said = "\n".join([line for line in lines if line.startswith("=====")][:12])
        raise AssertionError(f"exit code {status} after {passed}: {said[:700]}\n{output[-500:]}")
    return {"ok": True, "cases": passed, "summary": lines[-1]}


def run_sanitized(names: Sequence[str], device: str = "cuda", say: Callable[[str], object] = print) -> None:
    """Run the named cases of the stage in this process; a line for each that passed."""
    from workers.bench.gpu.checks import kernels, quantised, selection
    from workers.bench.gpu.journal import Journal

    context = Context(Journal(Path(os.devnull), "sanitizer", device == "cpu"), torch.device(device), float("inf"))
    for case in (*kernels.cases(context), *quantised.cases(), *selection.cases()):
        if case.name in names:
            case.run(context)
            say(f"passed {case.name}")
