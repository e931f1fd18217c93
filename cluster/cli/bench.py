"""`longreach bench`: how fast a checkpoint is on this machine, as tables, dated result files and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.common import one_line_errors, open_display, say, say_json
from cluster.cli.eval import Counts, Setting

if TYPE_CHECKING:
    from cluster.bench.speed.settings import Kind

_FILE_WIDTH = 160  # columns of a table that goes into a file or pipe
_PATH = click.Path(path_type=Path)


@click.group()
def bench() -> None:
    """Measure how fast a checkpoint is on this machine.

    \b
    prefill: time to the first token against length, dense and sparse
    decode:  time of a token against the context before it
    scaling: one document over more stages and shards, a growing one, jobs beside each other
    compare: other engines on the same checkpoint and prompts, in turns
    report:  Markdown and pictures of result files

    Each reads one YAML file (configs/bench has one a kind) and starts its own heads. Results go to
    bench-KIND-MODEL-DATE.json in --out, written after every row. Other programs disturb: what they use is measured
    in every repeat, and repeats in which they used more than `max_others` of the cores are marked and made again.
    """


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the verbs that measure."""
    options = [
        click.argument("config", type=_PATH, required=False),
        click.option("--model", type=_PATH, help="A model, in place of the file's `model`."),
        click.option("--lengths", type=Counts(), help="Token counts, in place of the file's, such as 4K,16K."),
        click.option("--repeats", type=click.IntRange(1, 1000), help="Undisturbed repeats, in place of the file's."),
        click.option("--seed", type=click.IntRange(0), help="Of the prompts, in place of the file's."),
        click.option(
            "--set", "more", type=Setting(), multiple=True, metavar="KEY=VALUE",
            help="Another key of the file (repeatable), such as warm_up=0 or settings.kv_cache.dtype=int8.",
        ),
        click.option(
            "--out", type=_PATH, default=Path(), show_default="current folder",
            help="Folder for results; made if absent.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, not as a table."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _measure(kind: Kind, config: Path | None, out: Path, as_json: bool, **given: Any) -> None:
    from cluster.bench.speed.settings import load_bench
    from cluster.bench.speed.suite import run_bench
    from cluster.config.configs_dir import configs_dir
    from cluster.hub.models import as_named

    with one_line_errors():
        file = config or configs_dir() / "bench" / f"{kind}.yaml"
        overrides: dict[str, Any] = dict(given["more"])
        if given["model"] is not None:
            overrides["model"] = str(as_named(str(given["model"]), given["model"].absolute()))
        for key in ("repeats", "seed"):
            if given[key] is not None:
                overrides[key] = given[key]
        overrides |= given.get("peers", {})
        if given["lengths"]:
            overrides["lengths"] = list(given["lengths"])
        overrides = dict(sorted(overrides.items(), key=lambda item: item[0].count(".")))  # keys within others last
        with open_display(as_json) as display:
            try:
                report, result = run_bench(load_bench(file, overrides), kind, out, display)
            finally:
                display.clear()
        if as_json:
            say_json(report)
        else:
            _print_table(report)
        say(f"result: {result.path}", err=True)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console

    from cluster.bench.speed.tables import cells, notes
    from cluster.tools.display import in_table, plain_table

    header, rows = cells(report)
    table = plain_table(*header)
    for row in rows:
        table.add_row(*map(in_table, row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    console.print(table)
    for note in notes(report):
        console.print(note, highlight=False, markup=False, soft_wrap=True)


@bench.command()
@_options
def prefill(**given: Any) -> None:
    """Time to the first token against the length of a prompt, in every mode of CONFIG.

    \b
    longreach bench prefill
    longreach bench prefill --model DIR --lengths 4K,16K,64K,128K --out docs/results
    """
    _measure("prefill", **given)


@bench.command()
@_options
def decode(**given: Any) -> None:
    """Time of a token against the context before it, in every mode of CONFIG."""
    _measure("decode", **given)


@bench.command()
@_options
def scaling(**given: Any) -> None:
    """Time of one document over more stages and shards, of a growing one, and of jobs beside each other.

    Every shard reports when it computed each chunk: the result has the timeline, its bubbles, what links and
    reductions cost a chunk, and the tokens of every expert.
    """
    _measure("scaling", **given)


@bench.command()
@_options
@click.option("--url", help="An OpenAI-compatible server (http://host:8000/v1) as a further peer.")
@click.option("--url-model", help="The server's name for the model; default: the first that it lists.")
@click.option("--vllm-python", type=_PATH, help="A Python that has vLLM, as a further peer.")
@click.option("--llama-server", type=_PATH, help="The path of llama-server (llama.cpp), as a further peer.")
@click.option("--gguf", type=_PATH, help="The same checkpoint for llama.cpp; default: the model, which is a GGUF file.")
def compare(
    url: str | None, url_model: str | None, vllm_python: Path | None, llama_server: Path | None, gguf: Path | None,
    **given: Any,
) -> None:  # fmt: skip
    """Our engine and others on the same checkpoint, prompts and threads, in turns in one run.

    Those of CONFIG, here transformers, and those that are named. Keys of servers are read from OPENAI_API_KEY.

    \b
    longreach bench compare --model DIR --lengths 4K,16K
    longreach bench compare --model DIR --url http://127.0.0.1:8000/v1
    """
    if gguf is not None and llama_server is None:
        raise click.UsageError("--gguf: is for llama.cpp: name --llama-server too")
    peers: dict[str, dict[str, Any]] = {}
    if url is not None:
        peers["peers.server"] = {"kind": "openai", "url": url, "model": url_model}
    if vllm_python is not None:
        peers["peers.vllm"] = {"kind": "vllm", "python": str(vllm_python.absolute())}
    if llama_server is not None:
        paths = {"server": str(llama_server.absolute()), "gguf": str(gguf.absolute()) if gguf is not None else None}
        peers["peers.llama_cpp"] = {"kind": "llama.cpp", **paths}
    _measure("compare", peers=peers, **given)


@bench.command()
@click.argument("results", type=_PATH, nargs=-1, required=True)
@click.option("--out", type=_PATH, required=True, help="Folder for report.md and pictures; made if absent.")
@click.option(
    "--format", "formats", type=click.Choice(["png", "svg"]), multiple=True, default=["png"], show_default=True,
    help="Of pictures (repeatable); report.md shows the first.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the paths as one JSON object.")
def report(results: tuple[Path, ...], out: Path, formats: tuple[str, ...], as_json: bool) -> None:
    """Draw RESULTS, files of `longreach bench` and of `longreach eval recall`, and write report.md.

    \b
    longreach bench report bench-*.json eval-recall-*.json --out report --format png --format svg
    """
    from cluster.bench.report.files import read_results
    from cluster.bench.report.markdown import write_report

    with one_line_errors():
        read = read_results(results)
        with open_display(as_json) as display:
            display.status("drawing")
            paths = write_report(read, out, list(dict.fromkeys(formats)))
    if as_json:
        say_json({"files": [str(path) for path in paths]})
    else:
        for path in paths:
            say(str(path))


VERBS = (bench,)
