"""Prefill through the service and in the bare runner while other programs compute on the same cores."""

from __future__ import annotations

import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, get_args

from protos.node.environment import usable_cores

Kind = Literal["loop", "pinned", "vector"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Rate = Callable[[], float]  # tokens a second of one prefill

# A neighbour: one thread that never waits. `pinned` stays on the core of its number, `vector` multiplies matrices.
_LOOP = "while True: pass"
_PINNED = (
    "import os, sys\nos.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[int(sys.argv[1])]])\nwhile True: pass"
)
_VECTOR = "import numpy\na = numpy.ones((1024, 1024), numpy.float32)\nwhile True: a @ a"
_PROGRAMS: dict[Kind, str] = {"loop": _LOOP, "pinned": _PINNED, "vector": _VECTOR}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_END_S = 10.0  # for a program to end after SIGTERM


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A program beside the measurement: one of `KINDS`, or a command line of any program, such as an idle server.

    Its processes have `settle_s` seconds to begin.
    """

    kind: Kind = "loop"
    command: str | None = None
    settle_s: float = 1.0

    def start(self, number: int) -> subprocess.Popen[bytes]:
        """Start the program for the `number`-th time, in a process group of its own."""
        if self.command is not None:
            return subprocess.Popen(shlex.split(self.command), stdout=subprocess.DEVNULL, start_new_session=True)
        command = [sys.executable, "-c", _PROGRAMS[self.kind], str(number % usable_cores())]
        return subprocess.Popen(command, env=_ONE_THREAD, start_new_session=True)


@contextmanager
def neighbours(count: int, program: Neighbour) -> Iterator[None]:
    """Let a program run `count` times meanwhile."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            running.append(program.start(number))
        if count:
            time.sleep(program.settle_s)
        if any(process.poll() is not None for process in running):
            raise RuntimeError(f"neighbours: {program.command or program.kind} ended by itself")
        yield
    finally:
        for process in running:
            _end(process, gently=program.command is not None)


def _end(process: subprocess.Popen[bytes], gently: bool) -> None:
    """End a process with all of its group: a server's own children would stay behind."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if gently:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure_neighbours(
    rates: Mapping[str, Rate], counts: Sequence[int], program: Neighbour, repeats: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure every rate beside each number of neighbours, in turns; returns a row a number.

    A row has `neighbours`, the rates and their medians, and the shares of the first number's medians. `fair` is the
    share of one thread a core where all threads have equal weight.
    """
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    for count in counts:
        with neighbours(count, program):
            measured: dict[str, list[float]] = {name: [] for name in rates}
            for repeat in range(repeats):
                for name, rate in rates.items():
                    measured[name].append(rate())
                    say(f"{count} neighbours, {name}, {repeat + 1} of {repeats}: {measured[name][-1]:,.0f} tokens/s")
        middle = {name: statistics.median(values) for name, values in measured.items()}
        first = first or middle
        row: dict[str, Any] = {"neighbours": count, "fair": round(usable_cores() / (usable_cores() + count), 3)}
        for name, values in measured.items():
            row[name] = {
                "tokens_per_s": [round(value, 1) for value in values],
                "median": round(middle[name], 1),
                "share": round(middle[name] / first[name], 3),
            }
        rows.append(row)
    return rows
