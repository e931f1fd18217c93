"""One call of the benchmark: a parent that watches, and children that run cases.

An error on a GPU may leave a process that can use it no more, and a kernel may hang. So cases run in a child; where it
dies or is late, the case it was at is noted as failed and another child goes on with the next one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Journal, Line

COMPLETE, FAILED, TIME_IS_OVER, UNUSABLE = 0, 1, 3, 4  # exit codes
_POLL_S = 0.2
_RESERVE_S = 6.0  # to end in, of the minutes of a call
_START_S = 180.0  # until a child begins its first case
_ERROR_CHARS = 1500
_REHEARSED = 5  # times slower may a rehearsal be: CPUs are shared


def watch(journal: Journal, minutes: float, command: Sequence[str], environment: dict[str, str]) -> int:
    """Run `command`, a child, again and again until nothing is left or the minutes are over.

    A child is called with the minutes that are left as its last argument. Returns an exit code: `TIME_IS_OVER` where
    another call has something to do.
    """
    deadline = time.monotonic() + 60 * minutes
    while True:
        left = deadline - time.monotonic() - _RESERVE_S
        if left <= 0:
            return TIME_IS_OVER
        before = len(journal.failed_here())
        process = subprocess.Popen([*command, f"{left / 60:.4f}"], env=os.environ | environment)
        code = _wait(process, journal, deadline)
        at = journal.open_case()
        if at is not None:
            what = "time of the call is over" if code is None and time.monotonic() >= deadline - 1 else "no end in time"
            error = what if code is None else f"the process ended with code {code}"
            journal.write(at["stage"], at["case"], "failed", {"error": error})
        if code == COMPLETE:
            return FAILED if journal.failed_here() else COMPLETE
        if code == TIME_IS_OVER or time.monotonic() >= deadline - 1:
            return TIME_IS_OVER
        if len(journal.failed_here()) == before:
            print(f"error: the process ended with code {code} outside of a case", file=sys.stderr)
            return FAILED


def _wait(process: subprocess.Popen[Any], journal: Journal, deadline: float) -> int | None:
    """Return the exit code of the child; None where it was ended, being late."""
    began, seen = time.monotonic(), ""
    try:
        while process.poll() is None:
            now, at = time.monotonic(), journal.open_case()
            name = "" if at is None else f"{at['stage']} {at['case']}"
            if name != seen:
                began, seen = now, name
            limit = _START_S if at is None else float(at.get("limit_s", _START_S))
            if now > began + limit or now > deadline:
                return None
            time.sleep(_POLL_S)
        return process.returncode
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def run_cases(context: Context, cases: Sequence[Case]) -> int:
    """Run what is not done yet, in order; returns the exit code of a child."""
    journal = context.journal
    finished = journal.done() | journal.failed_here()
    is_short = False
    for case in cases:
        if (case.stage, case.name) in finished:
            continue
        if context.left() < case.needs_s:
            is_short = True
            continue
        limit_s = case.limit_s * (_REHEARSED if context.rehearsal else 1)
        journal.write(case.stage, case.name, "begun", {"limit_s": limit_s})
        began = time.perf_counter()
        try:
            values = _run(context, case)
        except Exception as error:  # noqa: BLE001 - a case that fails must not cost the others
            journal.write(case.stage, case.name, "failed", {"error": _text(error)})
            print(f"{case.stage:<8} {case.name:<58} failed: {str(error).splitlines()[:1]}", flush=True)
            if not _is_usable(context):
                return UNUSABLE
        else:
            seconds = {} if context.rehearsal else {"wall_s": round(time.perf_counter() - began, 2)}
            journal.write(case.stage, case.name, "done", values | seconds)
            print(f"{case.stage:<8} {case.name:<58} {brief(values)}", flush=True)
        context.free()
    return TIME_IS_OVER if is_short else COMPLETE


def _run(context: Context, case: Case) -> Line:
    """Return the figures of a case; those that it yields before are written as parts."""
    found = case.run(context)
    if not isinstance(found, Iterator):
        return found
    values: Line = {}
    for values in found:
        context.journal.write(case.stage, case.name, "part", values)
    return values


def brief(values: Line) -> str:
    """Return the most telling figures of a line."""
    shown = []
    for name in (
        "ok",
        "ms",
        "tflops",
        "of_matmul",
        "gbs",
        "of_copy",
        "share",
        "seconds",
        "ms_a_token",
        "error",
        "ratio",
    ):
        value = values.get(name)
        if value is not None:
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(shown)


def _text(error: Exception) -> str:
    return "".join(traceback.format_exception(error))[-_ERROR_CHARS:]


def _is_usable(context: Context) -> bool:
    """Return whether the device still computes after an error."""
    try:
        context.synchronize()
        torch.ones(8, device=context.device).sum().item()
    except RuntimeError:
        return False
    return True


def child_command(arguments: Sequence[str]) -> list[str]:
    """Return the command of a child but for the minutes."""
    return [sys.executable, "-u", "-m", "workers.bench", "gpu", *arguments, "--child"]


def child_environment(rehearsal: bool) -> dict[str, str]:
    """Return what a child needs in its environment, before it imports torch and Triton."""
    if rehearsal:
        return {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
