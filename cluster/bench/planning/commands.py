"""The commands of `python -m cluster.bench` that hold predictions against measurement."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.bench.planning.check import check_plan
from cluster.common.units import parse_count
from protos.node.environment import write_result

_PATH = click.Path(path_type=Path)
_OUT = click.option("--json", "out", type=_PATH, help="Also write the result to this file.")
_MODEL = click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, help="A checkpoint.")


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command("plan-check")
@_MODEL
@click.option("--length", default="16K", show_default=True, help="Prompt tokens; the sparse shape has twice as many.")
@click.option("--chunk", default="2048", show_default=True, help="Tokens of a step.")
@click.option("--decode", type=click.IntRange(8), default=64, show_default=True, help="Decode steps after it.")
@click.option("--resume", type=_PATH, help="A file of JSON lines: shapes it has are not measured again.")
@_OUT
def plan_check(model: Path, length: str, chunk: str, decode: int, resume: Path | None, out: Path | None) -> None:
    """Five shapes: what `longreach plan` predicts of memory and time, and what is measured.

    Exit code 1: memory is off by more than 5 %, or a time by more than 20 %.
    """
    result = check_plan(model, parse_count(length), parse_count(chunk), decode, resume, _say)
    click.echo(write_result(out, {"what": "longreach plan against measurement"} | result))
    if not result["met"]:
        raise SystemExit(1)


PLANNING_COMMANDS: list[click.Command] = [plan_check]
