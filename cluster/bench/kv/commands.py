"""The commands of `python -m cluster.bench` about stored KV."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cluster.bench.kv.documents import measure_documents
from cluster.bench.kv.questions import measure_questions
from cluster.bench.kv.storing import measure_storing
from cluster.common.units import parse_count
from protos.node.environment import write_result

KV_COMMANDS: list[click.Command] = []


def _measurement(length: str) -> Callable[[Callable[..., dict[str, Any]]], click.Command]:
    """Add a command that prints the result of a function, with the options of all and exit code 1 for a broken bound.

    Args:
        length: tokens of a document or prompt, by default.
    """

    def add(measure: Callable[..., dict[str, Any]]) -> click.Command:
        @functools.wraps(measure)
        def run(length: str, out: Path | None, **options: Any) -> None:
            result = measure(length=parse_count(length), say=lambda line: click.echo(line, err=True), **options)
            click.echo(write_result(out, result))
            if not result["met"]:
                raise SystemExit(1)

        for option in (
            click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result to this file."),
            click.option(
                "--folder", type=click.Path(path_type=Path, exists=True, file_okay=False),
                help="On the disk that stores; default: that of temporary files.",
            ),
            click.option("--length", default=length, show_default=True, help="Tokens of a document or prompt."),
        ):  # fmt: skip
            run = option(run)
        command = click.command(measure.__name__.replace("_", "-"))(run)
        KV_COMMANDS.append(command)
        return command

    return add


_SEED = click.option("--seed", default=0, show_default=True, help="Of documents and prompts.")


@_measurement("256K")
@_SEED
@click.option(
    "--dtype", type=click.Choice(["auto", "float32"]), default="auto", show_default=True,
    help="auto: as the checkpoint is stored, bfloat16; float32: the tokens of answers are compared, too.",
)  # fmt: skip
@click.option(
    "--keep-page-cache", is_flag=True, help="Leave stored files in it, instead of reading them from the disk."
)
def kv_questions(
    length: int, dtype: str, seed: int, keep_page_cache: bool, folder: Path | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """First tokens of questions about one document: first, again, after `down` and `up`, elsewhere.

    2 x 2 processes of the demo model store; 1 x 4, 1 x 1 and an importing head read.
    """
    what = "questions about one document, read for the first time and from stored KV"
    return {"what": what} | measure_questions(length, dtype, seed, keep_page_cache, folder, say)


@_measurement("64K")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Pairs behind the medians.")
def kv_storing(length: int, repeats: int, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """What storing adds to prefills and decode steps: the same prompts on a head with a store and on one without."""
    return {"what": "prefill and decode with and without stored KV"} | measure_storing(length, repeats, folder, say)


@_measurement("256K")
@_SEED
def kv_documents(length: int, seed: int, folder: Path | None, say: Callable[[str], None]) -> dict[str, Any]:
    """What is computed again after giving up at 60 % and after growing by 10 %, and what deleted documents leave."""
    what = "prompts that are given up and submitted again, a document that grows, documents that are deleted"
    return {"what": what} | measure_documents(length, seed, folder, say)
