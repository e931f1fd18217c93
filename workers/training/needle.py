"""Retrain the needle checkpoint: `python -m workers.training.needle --out DIR`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

from workers.training.checkpoint import COPIED
from workers.training.loop import Settings, StepReport, Trainer, bfloat16_is_faster

PROGRESS_SECONDS = 3.0
ASSETS = Path(__file__).resolve().parents[2] / "configs" / "needle"
NEEDED = (*COPIED, "book.txt.gz")
EPILOG = """\
examples:
  the shipped recipe, about 40 minutes on 2 cores with AMX:
    python -m workers.training.needle --out /tmp/needle
  a look at it in two minutes, at short lengths:
    python -m workers.training.needle --out /tmp/needle --minutes 2 --max-length 256
  continue after an interruption (the time already trained counts towards --minutes):
    python -m workers.training.needle --out /tmp/needle --resume /tmp/needle

The sequence length starts at 256 and doubles each time the first digit of a code is right often enough (95 to 97 %), up
to --max-length. "first digits" in the progress lines is that accuracy over the last 30 steps of the current length;
chance is 10 %. The result is a Hugging Face directory; training_state.pt in it is only needed for --resume.
LD_PRELOAD of tcmalloc makes it faster still.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.training.needle",
        description="Train the small needle checkpoint from nothing but its config, tokenizer, word list and book.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, minutes=40.0)
    return parser


def add_options(parser: argparse.ArgumentParser, minutes: float) -> None:
    """Add the options of a training run, of so many minutes by default."""
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where checkpoint and training state go")
    late = f"training time; the rate falls after 60 %% of it ({minutes:g})"
    add("--minutes", type=float, default=minutes, metavar="M", help=late)
    add("--steps", type=int, metavar="N", help="train exactly N steps instead of --minutes (reproducible)")
    add("--seed", type=int, default=0, metavar="S", help="of the starting weights and the documents (0)")
    add("--threads", type=int, metavar="N", help="CPU threads (all cores, or OMP_NUM_THREADS)")
    add("--max-length", type=int, default=4096, metavar="L", help="longest sequence trained, 64 to 4096 tokens (4096)")
    add("--resume", type=Path, metavar="CKPT", help="training_state.pt of an earlier run, or the directory it is in")
    add("--assets", type=Path, default=ASSETS, metavar="DIR", help="config, tokenizer, words, book (configs/needle)")
    add("--json-log", type=Path, metavar="FILE", help="append one JSON object per step to FILE")
    add(
        "--precision",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="of matrix products; auto times both and takes the faster; weights are always float32 (auto)",
    )


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Return the settings of the command line. ValueError names the option that is wrong."""
    return Settings(**given(arguments, NEEDED))


def given(arguments: argparse.Namespace, needed: Sequence[str]) -> dict[str, Any]:
    """Return the settings that any run has; `needed` are files of --assets. ValueError names the wrong option."""
    assets = arguments.assets
    missing = [name for name in needed if not (assets / name).is_file()]
    if missing:
        raise ValueError(f"--assets: {assets} lacks {', '.join(missing)}; give a directory like configs/needle")
    names = ("out", "assets", "minutes", "steps", "seed", "max_length", "resume")
    fast = bfloat16_is_faster() if arguments.precision == "auto" else arguments.precision == "bfloat16"
    return {name: getattr(arguments, name) for name in names} | {"bfloat16": fast}


def reporter(screen: TextIO, log: TextIO | None) -> Callable[[StepReport], None]:
    """Return a callback that prints a progress line every few seconds and logs every step."""
    printed = 0.0

    def report(step: StepReport) -> None:
        nonlocal printed
        if log is not None:
            print(step.json(), file=log, flush=True)
        if time.monotonic() - printed > PROGRESS_SECONDS:
            print(step.line(), file=screen, flush=True)
            printed = time.monotonic()

    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns 0 when trained to the end, 1 if the loss diverged, 2 for wrong options, 130 when interrupted (state saved).
    """
    return train(build_parser().parse_args(argv), lambda arguments: Trainer(settings_of(arguments)))


def train(arguments: argparse.Namespace, make_trainer: Callable[[argparse.Namespace], Trainer]) -> int:
    """Make a trainer, run it and return the exit code of `main`; signals stop it after the step it is in."""
    if arguments.threads is not None and not 1 <= arguments.threads <= (os.cpu_count() or 1):
        print(f"error: --threads={arguments.threads}: must be 1 to {os.cpu_count()} on this machine", file=sys.stderr)
        return 2
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)  # denormal gradients cost a hundredfold
    try:
        trainer = make_trainer(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    settings = trainer.settings
    precision = "bfloat16" if settings.bfloat16 else "float32"
    print(f"training from step {trainer.step}, {torch.get_num_threads()} threads, {precision} products", flush=True)
    earlier = {number: signal.signal(number, lambda *_: trainer.stop()) for number in (signal.SIGINT, signal.SIGTERM)}
    log = arguments.json_log.open("a") if arguments.json_log else None
    try:
        trainer.run(reporter(sys.stdout, log))
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
        if log is not None:
            log.close()
    if trainer.stopping:
        print(f"interrupted at step {trainer.step}; continue with --resume {settings.out}", file=sys.stderr)
        return 130
    accuracy, length = trainer.curriculum.accuracy, trainer.curriculum.lengths[trainer.curriculum.stage]
    print(f"wrote {settings.out} after {trainer.step} steps: first digits {accuracy:.1%} at {length} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
