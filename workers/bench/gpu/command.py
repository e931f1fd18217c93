"""Command line of the benchmark of GPUs: `python -m workers.bench gpu`."""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from protos.node.environment import build_id
from workers.bench.gpu.call import child_command, child_environment, run_cases, watch
from workers.bench.gpu.context import Case, Context
from workers.bench.gpu.journal import Journal, Line, read_lines
from workers.bench.gpu.show import show

STAGES = ("env", "checks", "kernels", "tune", "prefill", "decode")


def add_options(verb: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    verb.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"any of {', '.join(STAGES)}, in this order (default: all)"
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="lines of JSON; what it has done is not done again")
    verb.add_argument("--minutes", type=float, default=9.0, help="end after so many (default: 9); call again to go on")
    verb.add_argument("--rehearse", action="store_true", help="run everything tiny on a CPU, and measure nothing")
    verb.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains this")
    verb.add_argument("--show", type=Path, metavar="FILE", help="print a file beside the targets, and run nothing")
    verb.add_argument("--cards", type=Path, metavar="FILE", help="write a file's stage tune into the table of cards")
    verb.add_argument("--call", default="", help=argparse.SUPPRESS)
    verb.add_argument("--child", type=float, metavar="MINUTES", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns the exit code (3: call again, there is more to do).

    Raises:
        ValueError: the request cannot be carried out.
    """
    if options.show is not None:
        for text in show(options.show):
            print(text)
        return 0
    if options.cards is not None:
        from workers.bench.gpu.tune import write_table

        print(f"the table of cards has {write_table(options.cards)}")
        return 0
    unknown = [stage for stage in options.stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"STAGE: {unknown[0]!r}: must be one of {', '.join(STAGES)}")
    if options.out is None:
        raise ValueError("--out: name a file for the lines, such as --out gpu.jsonl")
    if not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out: {options.out}: its folder does not exist; create it first")
    if not 0 < options.minutes <= 600:
        raise ValueError(f"--minutes: {options.minutes:g}: must be above 0, and at most 600")
    if not options.rehearse and not torch.cuda.is_available():
        raise ValueError("gpu: torch finds no GPU here; --rehearse runs everything tiny on a CPU")
    read_lines(options.out)
    stages = list(dict.fromkeys(options.stages)) or list(STAGES)
    if options.child is not None:
        return _child(options, stages)
    journal = Journal(options.out, uuid.uuid4().hex[:8], options.rehearse)
    arguments = [*stages, "--out", str(options.out), "--call", journal.call, "--only", options.only]
    if options.rehearse:
        arguments.append("--rehearse")
    environment = child_environment(options.rehearse)
    return watch(journal, options.minutes, child_command(arguments), environment)


def _child(options: argparse.Namespace, stages: Sequence[str]) -> int:
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", 0)
    if options.rehearse:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    journal = Journal(options.out, options.call, options.rehearse, origin_of(device))
    journal.check_card()
    context = Context(journal, device, time.monotonic() + 60 * options.child)
    cases = [case for case in all_cases(context, stages) if options.only in case.name]
    with torch.inference_mode():
        return run_cases(context, cases)


def origin_of(device: torch.device) -> Line:
    """Return what every line says of its origin: the build, and the card where there is one."""
    origin: Line = {"build": build_id()}
    return origin | ({"card": torch.cuda.get_device_name(device)} if device.type == "cuda" else {})


def all_cases(context: Context, stages: Sequence[str]) -> Iterator[Case]:
    """Yield the cases of stages, in the order of `STAGES`."""
    from workers.bench.gpu import card, tune
    from workers.bench.gpu.checks import kernels, programs, quantised, selection
    from workers.bench.gpu.rates import attention, layer
    from workers.bench.gpu.whole import end_to_end

    by_stage = {
        "env": lambda: card.cases(),
        "checks": lambda: [*kernels.cases(context), *quantised.cases(), *selection.cases(), *programs.cases()],
        "kernels": lambda: [*attention.cases(context), *layer.cases(context)],
        "tune": lambda: tune.cases(context),
        "prefill": lambda: end_to_end.prefill_cases(context),
        "decode": lambda: end_to_end.decode_cases(context),
    }
    for stage in stages:
        yield from by_stage[stage]()
