"""The commands of `python -m cluster.bench` that hold predictions against measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cluster.bench.planning.check import SPARSE, Amount, check_plan
from cluster.bench.planning.eta import check_eta
from cluster.bench.simulation.real import check_processes, check_stages
from cluster.bench.simulation.study import draw_study, study, table
from cluster.common.units import parse_count
from cluster.latency.hardware import load_hardware
from cluster.planner.subject import load_subject
from cluster.planner.target import cpu_target, gpu_target
from protos.errors import UserError
from protos.node.environment import write_result

_MOST_ERROR = 0.1  # of a simulated time against a real one
_MOST_STAGES = 256
_PATH = click.Path(path_type=Path)
_OUT = click.option("--json", "out", type=_PATH, help="Also write the result to this file.")
_MODEL = click.option("--model", type=click.Path(path_type=Path, exists=True), required=True, help="A checkpoint.")


def _say(line: str) -> None:
    click.echo(line, err=True)


class Measurement(click.Command):
    """A command whose bad input is one line."""

    def invoke(self, context: click.Context) -> Any:
        """Run the command. Raises click.UsageError for a UserError."""
        try:
            return super().invoke(context)
        except UserError as error:
            raise click.UsageError(str(error), context) from error


def _numbers(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    numbers = [int(word) if word.strip().isdecimal() else 0 for word in text.split(",")]
    if not all(1 <= number <= _MOST_STAGES for number in numbers):
        raise click.BadParameter(f"{text}: must be whole numbers from 1 to {_MOST_STAGES}, such as 1,2,4,8")
    return numbers


@click.command("plan-check", cls=Measurement)
@_MODEL
@click.option("--length", default="16K", show_default=True, help="Prompt tokens; the sparse shape has twice as many.")
@click.option("--chunk", default="2048", show_default=True, help="Tokens of a step.")
@click.option("--decode", type=click.IntRange(8), default=256, show_default=True, help="Decode steps after it.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Of the measurement; medians.")
@click.option("--resume", type=_PATH, help="A file of JSON lines: shapes it has are not measured again.")
@_OUT
def plan_check(
    model: Path, length: str, chunk: str, decode: int, repeats: int, resume: Path | None, out: Path | None
) -> None:
    """Five shapes: what `longreach plan` predicts of memory and time, and what is measured.

    Exit code 1: memory is off by more than 5 %, or a time by more than 20 %.
    """
    amount = Amount(parse_count(length), parse_count(chunk), decode, repeats)
    result = check_plan(model, amount, resume, _say)
    click.echo(write_result(out, {"what": "longreach plan against measurement"} | result))
    if not result["met"]:
        raise SystemExit(1)


@click.command("eta", cls=Measurement)
@_MODEL
@click.option("--length", default="256K", show_default=True, help="Prompt tokens.")
@click.option("--chunk", default="2048", show_default=True, help="Tokens of a step.")
@click.option("--sparse", is_flag=True, help="Sparse prefill with fixed budgets of 1,024 columns and 2,048 offsets.")
@click.option("--before", default="512", show_default=True, help="Tokens of a prompt that the head has read before.")
@_OUT
def eta(model: Path, length: str, chunk: str, sparse: bool, before: str, out: Path | None) -> None:
    """The predicted end of a prefill at every tenth of it, and the truth.

    Exit code 1: at a tenth the prediction is off by more than 15 %.
    """
    pattern: dict[str, object] = SPARSE if sparse else {"enabled": False}
    result = check_eta(model, parse_count(length), parse_count(chunk), pattern, parse_count(before), _say)
    click.echo(write_result(out, {"what": "predicted end of a prefill", "sparse": sparse} | result))
    if not result["met"]:
        raise SystemExit(1)


@click.command(cls=Measurement)
@click.argument("config", type=_PATH)
@click.option("--context", default="128K", show_default=True, help="Prompt tokens.")
@click.option("--chunk", default="2048", show_default=True, help="Tokens of a step.")
@click.option("--stages", default="1,2,4,8,16", callback=_numbers, show_default=True, help="Numbers of stages.")
@click.option("--gpu", metavar="NAME", help="A GPU of the hardware table; default: this processor, as measured here.")
@click.option("--sparse", is_flag=True, help="Sparse prefill.")
@click.option(
    "--check", "real", metavar="LENGTH", help="Also measure 1 and 2 real stages with a prompt of so many tokens."
)
@click.option(
    "--processes", type=click.IntRange(1, 16), help="Also run so many stages that wait their times, as real processes."
)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Of every real prompt.")
@click.option("--picture", type=_PATH, help="Draw a PNG to this file (needs matplotlib).")
@_OUT
def simulate(
    config: Path, context: str, chunk: str, stages: list[int], gpu: str | None, sparse: bool, real: str | None,
    processes: int | None, repeats: int, picture: Path | None, out: Path | None,
) -> None:  # fmt: skip
    """Efficiency of more stages: the real scheduler over simulated stages, whose times the latency model predicts.

    CONFIG is what `longreach plan` takes; with --check or --processes it is a checkpoint folder. Exit code 1: a real
    pipeline took more than 10 % longer or shorter than the simulated one.
    """
    tokens = parse_count(chunk)
    deployment = load_subject(config, "cuda" if gpu else "cpu", chunk=tokens)
    table_of_hardware = load_hardware()
    target = (
        gpu_target(table_of_hardware, gpu)
        if gpu
        else cpu_target(table_of_hardware, data_dir=deployment.config.data_dir)
    )
    result: dict[str, Any] = {"what": "simulated pipelines", "model": config.resolve().name}
    result |= study(deployment, target.costs_of, parse_count(context), stages, sparse)
    for line in table(result):
        _say(line)
    if real is not None:
        result["real"] = check_stages(config, parse_count(real), tokens, repeats, _say)
    if processes is not None:
        where = parse_count(context), tokens, processes, repeats
        result["waiting"] = [check_processes(config, target.costs_of, *where, _say)]
    if picture is not None:
        draw_study(result, picture)
    click.echo(write_result(out, result))
    rows = [*result.get("real", ()), *result.get("waiting", ())]
    if any(abs(row["error"]) > _MOST_ERROR for row in rows):
        raise SystemExit(1)


PLANNING_COMMANDS: list[click.Command] = [plan_check, eta, simulate]
