"""Train a small checkpoint on RULER's tasks: `python -m workers.training.ruler --data DIR --out DIR`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from workers.training.needle import add_options, given, train
from workers.training.ruler.trainer import RulerSettings, RulerTrainer

NEEDED = (
    "config.json", "config_1m.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "words.json",
)  # fmt: skip
SAVE_STEPS = 50
EPILOG = """\
examples:
  samples, then the checkpoint from them:
    longreach eval ruler --export /tmp/samples --seed 1000 --lengths 512 --samples 300 --tasks niah_single_1,...
    python -m workers.training.ruler --data /tmp/samples --out /tmp/ruler-mini --json-log /tmp/ruler-mini/log.jsonl
  continue after an interruption (the time already trained counts towards --minutes):
    python -m workers.training.ruler --data /tmp/samples --out /tmp/ruler-mini --resume /tmp/ruler-mini

Short samples come first; the next length begins at 12, 25 and 45 % of the run. "first digits" in the progress lines is
the share of right first tokens of outputs at the current length; after it stands the same for every task. docs/
evaluation.md has the whole recipe.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m workers.training.ruler",
        description="Train a small checkpoint on exported samples of RULER's tasks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(parser, minutes=100.0)
    parser.add_argument(
        "--data", type=Path, required=True, metavar="DIR", help="samples: LENGTH/TASK/*.jsonl, as exported"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; exit codes as of `workers.training.needle`."""
    return train(
        build_parser().parse_args(argv),
        lambda arguments: RulerTrainer(
            RulerSettings(**given(arguments, NEEDED), data=arguments.data, save_steps=SAVE_STEPS)
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
