"""The commands of `python -m cluster.bench` about structured output."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path

import click

from cluster.bench.constraints.cost import measure_constraints
from cluster.bench.constraints.decoding import measure_decoding
from cluster.bench.faults.rig import FaultHead
from protos.node.environment import write_result

_OUT = click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result to this file.")


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, help="Has the tokenizer's files.")
@click.option("--tokens", type=click.IntRange(10), default=2000, show_default=True, help="Of each constraint.")
@_OUT
def constraints(out: Path | None, model: Path, tokens: int) -> None:
    """What constraints cost the head: to compile one, and the mask of each token of random answers under it."""
    click.echo(write_result(out, {"what": "masks of constrained answers"} | measure_constraints(model, tokens)))


@click.command("structured-output")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="In turns, behind the medians.")
@click.option("--tokens", type=click.IntRange(2), default=512, show_default=True, help="Of every answer.")
@_OUT
def structured_output(out: Path | None, rounds: int, tokens: int) -> None:
    """What a constraint adds to a decoded token of the demo model: its mask, and that nothing is decoded ahead."""
    with tempfile.TemporaryDirectory() as root, closing(FaultHead(Path(root), 1, 1)) as head:
        head.start()
        head.wait_until_running()
        found = measure_decoding(head, rounds, tokens, lambda line: click.echo(line, err=True))
    what = "tokens of answers with and without a constraint, in turns"
    click.echo(write_result(out, {"what": what, "rounds": rounds, "tokens": tokens} | found))


CONSTRAINT_COMMANDS: list[click.Command] = [constraints, structured_output]
