"""`longreach plan`: will it fit, and how long will it take, before anything is downloaded or started."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from cluster.cli.common import EXIT_WRONG, Count, one_line_errors, say_json

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("config", type=_PATH)
@click.option("--context", type=Count(), help="Tokens of the prompt and its answer (default: what CONFIG allows).")
@click.option("--gpu", metavar="[COUNTx]NAME", help="GPUs of the hardware table, such as h200 or 4xa100.")
@click.option("--have", metavar="COUNTxSIZE", help="GPUs by their memory alone, such as 2x24GB.")
@click.option("--cpu", metavar="SIZE", help="This processor with so much memory, such as 64GB.")
@click.option("--cores", type=click.IntRange(1, 4096), help="Cores of the processor (default: those usable here).")
@click.option(
    "--layout", metavar="STAGESxSHARDS", help="A split, such as 2x1 (default: that of a YAML, else the best)."
)
@click.option("--kv", type=click.Choice(["auto", "int8"]), default="auto", show_default=True, help="Type of KV.")
@click.option("--chunk", type=Count(), help="Most tokens of a step.")
@click.option("--hardware", type=_PATH, help="A table of more hardware, in the form of configs/hardware.yaml.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def plan(
    config: Path, context: int | None, gpu: str | None, have: str | None, cpu: str | None, cores: int | None,
    layout: str | None, kv: str, chunk: int | None, hardware: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Say whether CONFIG fits with a context, how long it takes, and how to lay it out.

    CONFIG is a cluster YAML, a model folder, or a config.json alone: no weights are needed. Without --gpu, --have or
    --cpu the plan is for the memory that is available on this machine now. Exit code 1: it does not fit.

    \b
    longreach plan Qwen3-30B-A3B/config.json --context 1m --gpu h200
    longreach plan configs/demo.yaml --context 128K --cpu 8GB --json
    """
    from cluster.planner.request import PlanRequest, plan_for

    with one_line_errors():
        report = plan_for(PlanRequest(config, context, gpu, have, cpu, cores, layout, kv, chunk, hardware))
        if as_json:
            say_json(report)
        else:
            from rich.console import Console

            from cluster.planner.render import render_plan

            render_plan(report, Console())
        if not report["fits"]:
            sys.exit(EXIT_WRONG)


VERBS = (plan,)
