"""`longreach eval`: accuracy of a checkpoint over long documents, as tables, pictures and dated result files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cluster.cli.common import EXIT_CLUSTER, Count, fail, one_line_errors, open_display, say, say_json

if TYPE_CHECKING:
    from cluster.tools.display import Display
    from cluster.tools.eval.grid import GridRun
    from cluster.tools.eval.results import ResultFile

_PATH = click.Path(path_type=Path)


class Counts(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # not generic before click 8.2
    """Token counts such as 4K,16K,64K."""

    name = "counts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(Count().convert(part.strip(), param, ctx) for part in str(value).split(","))


class Setting(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """KEY=VALUE over a key of the YAML file; the value is read as YAML."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, object]:
        from cluster.config.yaml_source import read_value

        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key.strip():
            self.fail(f"{value!r}: must be KEY=VALUE such as sparse.target_recall=0.99", param, ctx)
        try:
            return key.strip(), read_value(text)
        except ValueError:
            self.fail(f"{value!r}: its value is not YAML", param, ctx)


@click.group("eval")
def evaluate() -> None:
    """Measure how well a checkpoint reads long documents.

    \b
    needle: are facts found, at every depth and length, under every way to attend?
    recall: how much do sparse prefill and int8 KV change the next tokens?
    ruler:  RULER's thirteen tasks but for its two of questions, made offline
    show:   the table and the picture of result files

    Results go to eval-NAME-DATE.json and .png in --out. Without --model or --config the small trained checkpoint of
    the demo is measured.
    """


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of all evaluations."""
    options = [
        click.option("--config", type=_PATH, help="A YAML file: its model, layout, and all else not asked for here."),
        click.option("--model", type=_PATH, help="A model, in place of model.path; other keys stay."),
        click.option("--document", type=_PATH, help="A UTF-8 text (default: the King James Bible)."),
        click.option(
            "--sparse-threshold", type=Count(), default="0", show_default=True,
            help="Prompts longer than this are read sparsely.",
        ),
        click.option(
            "--kv", type=click.Choice(["auto", "int8"]), default="auto", show_default=True,
            help="Type of the KV cache; auto is the computing type.",
        ),
        click.option(
            "--set", "settings", type=Setting(), multiple=True, metavar="KEY=VALUE",
            help="Another key of the YAML (repeatable), such as sparse.target_recall=0.99.",
        ),
        click.option(
            "--out", type=_PATH, default=Path(), show_default="current folder",
            help="Folder for results; made if absent.",
        ),
        click.option("--picture/--no-picture", default=True, help="Draw a PNG too (needs longreach[eval])."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, not as a table."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@evaluate.command()
@click.option(
    "--lengths", type=Counts(), default="4K,16K,64K", show_default=True,
    help="Lengths in tokens, answer included; 4K is 4,096, 4k is 4,000.",
)  # fmt: skip
@click.option(
    "--depths", type=click.IntRange(1, 100), default=8, show_default=True,
    help="Needles a document, spread evenly over its depth.",
)  # fmt: skip
@click.option(
    "--modes", default="plain,yarn,dca,sparse", show_default=True,
    help="plain: positions as trained; yarn: stretched to the longest length; dca: dual chunk attention, dense; "
    "sparse: dca with vertical-slash prefill.",
)  # fmt: skip
@click.option(
    "--form", type=click.Choice(["answer", "prompt"]), default="answer", show_default=True,
    help="answer: the model writes the whole answer, and looks codes up while it decodes. prompt: the prompt ends just "
    "before the code, so the lookup is in a prefilled row: the harder test of sparse prefill.",
)  # fmt: skip
@click.option("--shared-words", is_flag=True, help="Half of the needles share a word with another: near misses count.")
@click.option("--trials", type=click.IntRange(1, 1000), default=1, show_default=True, help="Documents a length.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first document.")
@click.option("--max-tokens", type=Count(), default="24", show_default=True, help="Most tokens of an answer.")
@click.option("--thinking/--no-thinking", default=False, help="enable_thinking for the chat template.")
@_shared_options
def needle(as_json: bool, out: Path, picture: bool, **given: Any) -> None:
    """Hide facts in documents of several lengths and ask for all of them.

    Every mode is one cluster, every document is read once for all its questions. The result file is written after every
    document, so an interrupted evaluation keeps what it has. Exit code 3 when a document could not be read.

    \b
    longreach eval needle --lengths 4K,16K,64K
    longreach eval needle --model Qwen3-30B-A3B --config cluster.yaml --lengths 128K,256K --modes yarn,dca,sparse
    """
    from cluster.tools.eval.modes import find_target
    from cluster.tools.eval.needle import NeedleOptions, NeedleRun
    from cluster.tools.eval.results import ResultFile

    with one_line_errors():
        modes = _names(given["modes"])
        names = ("lengths", "form", "shared_words", "trials", "seed", "max_tokens", "thinking", "kv", "document")
        options = NeedleOptions(
            needles=given["depths"], modes=modes, sparse_threshold=given["sparse_threshold"],
            more=dict(given["settings"]), **{name: given[name] for name in names},
        )  # fmt: skip
        kinds = [options.form, "shared" if options.shared_words else "", options.kv if options.kv != "auto" else ""]
        with open_display(as_json) as display:
            target = find_target(given["config"], given["model"], display.amount)
            run = NeedleRun(target, options, display)
            result = ResultFile(out, "-".join(filter(None, ["eval-needle", run.report["model"], *kinds])))
            _run(run, result, display, picture, as_json)


@evaluate.command()
@click.option("--tokens", type=Count(), default="64K", show_default=True, help="Of the document, from its beginning.")
@click.option(
    "--next", "num_next", type=click.IntRange(1, 4096), default=64, show_default=True,
    help="Next tokens compared; each step follows the dense continuation.",
)  # fmt: skip
@click.option(
    "--positions", type=click.Choice(["auto", "plain", "yarn", "dca"]), default="auto", show_default=True,
    help="auto: dca if the checkpoint has its settings, else plain as far as it was trained, else yarn.",
)  # fmt: skip
@click.option("--sparse/--no-sparse", default=True, show_default=True, help="Whether sparse prefill is compared.")
@click.option(
    "--pinned", default="", metavar="LENGTHS",
    help="What a length scale pinned to other lengths changes, such as 1.05x,1.25x,2x,max or 256K.",
)  # fmt: skip
@click.option(
    "--against", type=_PATH, multiple=True, metavar="FOLDER",
    help="Another checkpoint with the same tokens, such as a quantised copy (repeatable).",
)  # fmt: skip
@_shared_options
def recall(as_json: bool, out: Path, picture: bool, **given: Any) -> None:
    """Read one document dense and sparsely (with --kv int8 also in int8), and compare what comes next.

    Gives for every layer and head the share of pairs visited and of attention mass kept, and for the next tokens how
    often the most likely one is the same and how far the logits are. Runs in one process on this machine, without Ray.

    \b
    longreach eval recall --tokens 32K
    longreach eval recall --model Qwen3-30B-A3B --document report.txt --tokens 64K --kv int8
    longreach eval recall --tokens 16K --pinned 1.05x,1.25x,2x,max
    longreach eval recall --model MODEL --no-sparse --against MODEL-int4 --tokens 4K
    """
    from cluster.tools.eval.modes import find_target
    from cluster.tools.eval.recall import RecallOptions, run_recall
    from cluster.tools.eval.results import ResultFile
    from cluster.tools.torch_process import ProcessFailed

    with one_line_errors():
        names = ("tokens", "num_next", "positions", "sparse", "kv", "sparse_threshold", "document")
        pinned = tuple(text.strip() for text in given["pinned"].split(",") if text.strip())
        more = dict(given["settings"])
        options = RecallOptions(
            pinned=pinned, more=more, against=given["against"], **{name: given[name] for name in names}
        )
        with open_display(as_json) as display:
            target = find_target(given["config"], given["model"], display.amount)
            try:
                report = run_recall(target, options, display)
            except ProcessFailed as error:
                fail(error, EXIT_CLUSTER)
        kinds = [
            "int8" if options.kv == "int8" else "",
            "pinned" if options.pinned else "",
            "weights" if options.against else "",
        ]
        result = ResultFile(out, "-".join(filter(None, ["eval-recall", report["model"], *kinds])))
        result.write(report)
        _finish(report, result, picture and (options.sparse or bool(options.pinned)), as_json)


@evaluate.command()
@click.option(
    "--lengths", type=Counts(), default="4K,16K", show_default=True,
    help="Lengths in tokens, answer included; 4K is 4,096, 4k is 4,000.",
)  # fmt: skip
@click.option("--tasks", default="all", show_default=True, help="Names such as niah_single_1,vt,cwe.")
@click.option(
    "--modes", default="plain,yarn,dca,sparse", show_default=True, help="Ways to attend, as of eval needle."
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(1, 10_000), default=20, show_default=True, help="Of every task and length."
)  # fmt: skip
@click.option(
    "--questions", type=click.IntRange(1, 100), default=1, show_default=True,
    help="Samples of a task in one haystack, which is read once for them all; above 1 they are not RULER's own.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the samples.")
@click.option("--max-tokens", type=Count(), help="Most tokens of an answer (default: RULER's, by task).")
@click.option("--thinking/--no-thinking", default=False, help="enable_thinking for the chat template.")
@click.option("--export", "folder", type=_PATH, help="Write the samples here as RULER's jsonl, and run nothing.")
@click.option("--resume", type=_PATH, help="Go on with a result file: what it has is not run again.")
@_shared_options
def ruler(as_json: bool, out: Path, picture: bool, folder: Path | None, resume: Path | None, **given: Any) -> None:
    """Ask RULER's tasks at several lengths under every way to attend.

    Needles, variable tracking, common and frequent words, and questions over two facts (qa_synthetic, not of RULER),
    all made on this machine. Every mode is one cluster. The result file is written after every task and length (with
    --questions, after every haystack); exit code 3 when one could not be run.

    \b
    longreach eval ruler --lengths 4K,16K --samples 20
    longreach eval ruler --model Qwen3-30B-A3B --config cluster.yaml --lengths 64K,128K --modes yarn,dca,sparse
    longreach eval ruler --lengths 128K --tasks niah_single_2,niah_multikey_1 --samples 40 --questions 10
    longreach eval ruler --export samples --lengths 4K,128K --samples 500
    """
    from cluster.tools.eval.modes import find_target
    from cluster.tools.eval.results import ResultFile, read_result
    from cluster.tools.eval.ruler.run import RulerOptions, RulerRun, export
    from cluster.tools.eval.ruler.tasks import TASKS

    with one_line_errors():
        names = (
            "lengths", "samples", "questions", "seed", "max_tokens", "thinking", "kv", "document", "sparse_threshold"
        )  # fmt: skip
        options = RulerOptions(
            tasks=tuple(TASKS) if given["tasks"] == "all" else _names(given["tasks"]), modes=_names(given["modes"]),
            more=dict(given["settings"]), **{name: given[name] for name in names},
        )  # fmt: skip
        with open_display(as_json) as display:
            target = find_target(given["config"], given["model"], display.amount)
            if folder is not None:
                number = export(target, options, folder, display)
                display.clear()
                say(f"{number} samples: {folder}", err=True)
                return
            run = RulerRun(target, options, display, read_result(resume) if resume else None)
            result = ResultFile(out, f"eval-ruler-{run.report['model']}", resume)
            _run(run, result, display, picture, as_json)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


@evaluate.command()
@click.argument("results", metavar="RESULT...", type=_PATH, nargs=-1, required=True)
@click.option(
    "--picture", type=_PATH, help="The PNG or SVG to write (default: beside RESULT; of several, FIRST-merged.png)."
)
@click.option("--name", help="What the table and the picture call the model (default: as RESULT does).")
def show(results: tuple[Path, ...], picture: Path | None, name: str | None) -> None:
    """Print the table of a RESULT file (.json) and draw its picture again; of several, one table and one picture.

    Several must be of eval ruler, with the same model, scoring and samples: cells of other lengths and modes come
    together. Of a cell that two files have, the later file's counts unless it failed, and a line says so.

    \b
    longreach eval show eval-ruler-NAME-DATE.json
    longreach eval show eval-ruler-4k.json eval-ruler-64k.json --picture eval-ruler.png
    """
    from rich.console import Console

    from cluster.tools.eval.merge import merge
    from cluster.tools.eval.plots import draw
    from cluster.tools.eval.results import read_result
    from cluster.tools.eval.tables import print_report

    with one_line_errors():
        reports = [(path.name, read_result(path)) for path in results]
        report, replaced = merge(reports) if len(reports) > 1 else (reports[0][1], [])
        for line in replaced:
            say(line, err=True)
        report = report | ({"model": name} if name else {})
        print_report(report, Console())
        path = picture or results[0].with_name(f"{results[0].stem}{'-merged' if len(results) > 1 else ''}.png")
        draw(report, path)
        say(f"picture: {path}", err=True)


def _run(run: GridRun[Any], result: ResultFile, display: Display, picture: bool, as_json: bool) -> None:
    """Fill the cells of an evaluation, and show what there is however it ends; exits if the cluster failed a cell."""
    try:
        run.run(result.write)
    finally:
        display.clear()
        if run.report["cells"]:
            _finish(run.report, result, picture, as_json)
    if any("error" in cell for cell in run.report["cells"]):
        sys.exit(EXIT_CLUSTER)


def _finish(report: dict[str, Any], result: ResultFile, picture: bool, as_json: bool) -> None:
    """Print the table or JSON, draw the picture, and say where the files are."""
    from rich.console import Console

    from cluster.tools.eval.plots import draw
    from cluster.tools.eval.tables import print_report
    from cluster.tools.figures import has_matplotlib

    if as_json:
        say_json(report | {"environment": result.environment})
    else:
        print_report(report, Console())
    say(f"result: {result.path}", err=True)
    if not picture:
        return
    if not has_matplotlib():
        click.echo("picture: not drawn, matplotlib is missing: pip install 'longreach[eval]'", err=True)
        return
    draw(report, result.picture)
    say(f"picture: {result.picture}", err=True)


VERBS = (evaluate,)
