"""Verbs about a checkpoint: `plan` (will it fit, and how long will it take) and `quantize`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.common import EXIT_CLUSTER, EXIT_WRONG, Count, fail, one_line_errors, open_display, say_json

if TYPE_CHECKING:
    from cluster.tools.display import Display

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

    CONFIG is a cluster YAML, a model folder, a config.json alone, a GGUF file, or the name of a model on a hub: no
    weights are needed. Without --gpu, --have or --cpu the plan is for the memory that is available on this machine now.
    Exit code 1: it does not fit.

    \b
    longreach plan Qwen/Qwen3-30B-A3B --context 1m --gpu h200
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


@click.command()
@click.argument("source", type=_PATH, metavar="IN")
@click.argument("target", type=_PATH, metavar="OUT")
@click.option("--bits", type=click.Choice(["4", "8"]), required=True, help="Of a weight.")
@click.option("--group", type=int, default=128, show_default=True, help="Inputs that share a scale.")
@click.option(
    "--only", default="attention,mlp,experts", show_default=True, metavar="KINDS",
    help="What is quantised: also head, the output matrix. Routers, norms and embedding never are.",
)  # fmt: skip
@click.option(
    "--check", type=Count(), metavar="TOKENS",
    help="Also compare the next tokens after so much of the book with those of IN, as eval recall --against does.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def quantize(
    source: Path, target: Path, bits: str, group: int, only: str, check: int | None, as_json: bool
) -> None:  # fmt: skip
    """Write a copy of the checkpoint IN with 4- or 8-bit weights to the new folder OUT.

    The copy has safetensors in compressed-tensors' format (pack-quantized), which vLLM and transformers read too. It is
    made matrix by matrix, without calibration: a checkpoint larger than memory will do. The table is the error of each
    layer's weights.

    \b
    longreach quantize Qwen3-30B-A3B Qwen3-30B-A3B-int4 --bits 4
    longreach quantize MODEL MODEL-int8 --bits 8 --only experts --check 4K
    longreach quantize MODEL MODEL-int4 --bits 4 --only attention,mlp,experts,head
    """
    from cluster.hub.models import model_argument
    from cluster.tools.quantize import QuantizeOptions
    from cluster.tools.quantize import quantize as write
    from cluster.tools.torch_process import ProcessFailed

    with one_line_errors():
        kinds = tuple(kind.strip() for kind in only.split(",") if kind.strip())
        with open_display(as_json) as display:
            source = model_argument("IN", source, on_progress=display.amount)
            options = QuantizeOptions(source, target, int(bits), group, kinds)
            try:
                report = write(options, display.count)
                if check is not None:
                    report["check"] = _check(source, target, check, display)
            except ProcessFailed as error:
                fail(error, EXIT_CLUSTER)
        if as_json:
            say_json(report)
        else:
            _print_quantized(report)


def _check(source: Path, target: Path, tokens: int, display: Display) -> dict[str, Any]:
    from cluster.tools.eval.modes import find_target
    from cluster.tools.eval.recall import RecallOptions, run_recall

    options = RecallOptions(tokens, sparse=False, against=(target,))
    return run_recall(find_target(None, source), options, display)


def _print_quantized(report: dict[str, Any]) -> None:
    from rich.console import Console

    from cluster.common.units import format_bytes
    from cluster.tools.display import plain_table
    from cluster.tools.eval.tables import print_report

    console = Console()
    kinds = [kind for kind in report["kinds"] if any(error["kind"] == kind for error in report["errors"])]
    table = plain_table("layer", *(f"{kind}, error" for kind in kinds))
    layers: dict[int | None, dict[str, float]] = {}
    for error in report["errors"]:
        layers.setdefault(error["layer"], {})[error["kind"]] = error["relative_error"]
    for layer, errors in layers.items():
        cells = (f"{errors[kind]:.2%}" if kind in errors else "" for kind in kinds)
        table.add_row("" if layer is None else str(layer), *cells)
    console.print(table)
    if "check" in report:
        print_report(report["check"], console)
    size = f"{format_bytes(report['bytes'])} for {format_bytes(report['bytes_before'])}"
    done = f"{report['quantized']:,} of {report['weights']:,} weights have {report['bits']} bits"
    click.echo(f"{report['target']}: {size}; {done}")


VERBS = (plan, quantize)
