"""The command line. Commands import what is heavy when they run, so that `--help` is instant.

Exit codes: 0 done; 1 a wrong answer, a failed check, or a job that did not succeed; 2 input that cannot be used
(nothing was started); 3 the cluster could not start, cannot be reached, or failed; 4 no such job or document;
130 interrupted.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from cluster.cli import bench as cli_bench
from cluster.cli import checkpoint as cli_checkpoint
from cluster.cli import docs as cli_docs
from cluster.cli import eval as cli_eval
from cluster.cli import head as cli_head
from cluster.cli import jobs as cli_jobs
from cluster.cli import keys as cli_keys
from cluster.cli.common import (
    EXIT_WRONG,
    Count,
    Verbs,
    one_line_errors,
    open_display,
    sampling_options,
    say,
    say_json,
    say_text,
)
from cluster.common.text_format import escape_unprintable
from protos.jobs.sampling import AnswerOptions


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="longreach", prog_name="longreach")
def main() -> None:
    """Answers questions about very long documents with a cluster of stages and shards.

    \b
    Try it:            longreach demo
    Check the machine: longreach doctor
    Your document:     longreach run configs/demo.yaml --document book.txt --question "Who ...?"
    Will it fit:       longreach plan MODEL --context 1m --gpu h200
    Make it smaller:   longreach quantize MODEL MODEL-int4 --bits 4
    Measure accuracy:  longreach eval needle --lengths 4K,16K
    Measure speed:     longreach bench prefill --lengths 4K,16K
    Keep it running:   longreach up CONFIG; longreach submit --document book.txt --question "Who ...?" --stream
    Read now, ask later: longreach docs add contract.pdf --read

    \b
    Exit codes: 0 done; 1 a wrong answer (demo), a failed check (doctor), a job that failed, was cancelled or has not
    ended in time; 2 bad input; 3 the cluster could not start, be reached, or go on; 4 no such job, document or key;
    130 interrupted.
    """
    os.umask(0o077)  # whatever is written is private


MODULES = (cli_head, cli_jobs, cli_docs, cli_eval, cli_checkpoint, cli_bench, cli_keys)
for verb in (verb for module in MODULES for verb in module.VERBS):
    main.add_command(verb)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--document", type=click.Path(path_type=Path), metavar="FILE|FOLDER",
    help="A text, PDF, folder, zip ...; it comes first in the prompt.",
)  # fmt: skip
@click.option("--question", multiple=True, help="A question about the document (repeatable: they share its prefill).")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A raw prompt, tokenised as it is.")
@click.option("--token-ids", type=click.Path(path_type=Path), help="A JSON file with a list of token ids.")
@sampling_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def run(
    config: Path, document: Path | None, question: tuple[str, ...], prompt_file: Path | None, token_ids: Path | None,
    as_json: bool, **sampling: Any,
) -> None:  # fmt: skip
    """Start the cluster of CONFIG, answer, stop it.

    Input is one of: a document with one or more questions, a raw prompt, or token ids.

    \b
    longreach run configs/demo.yaml --document report.txt --question "What was decided?" --question "By whom?"
    longreach run configs/single.yaml --token-ids ids.json --max-tokens 64 --logprobs 5 --json
    """
    from cluster.stages.socket_dirs import clean_run_dirs
    from cluster.tools.run import RunInput, run_once

    with one_line_errors():
        clean_run_dirs()
        source = RunInput(document, question, prompt_file, token_ids)
        report = run_once(config, source, AnswerOptions.from_values(sampling), open_display(as_json))
        if as_json:
            say_json(report)
            return
        for result in report["results"]:
            if result["question"] is not None:
                say(result["question"], bold=True)
            if result["reasoning"]:
                say_text(result["reasoning"], dim=True)
            say_text(str(result["token_ids"]) if result["text"] is None else result["text"].strip())
        click.echo(_summary(report), err=True)


def _summary(report: dict[str, Any]) -> str:
    first = report["results"][0]
    rate = first["prefill"]["tokens_per_s"]
    cached = sum(result["usage"]["cached_tokens"] for result in report["results"])
    speed = "" if rate is None else f" at {rate:,.0f}/s"
    return (
        f"{first['usage']['prompt_tokens']:,} prompt tokens read{speed}, {cached:,} from cache; first token after "
        f"{first['timings']['ttft_s']:.1f} s; cluster ready in {report['timings']['ready_s']:.1f} s"
    )


def _sparsity(attention: dict[str, Any] | None) -> str:
    if attention is None or attention["mode"] == "dense":
        return "every key was read\n"
    density, recall = attention["density"], attention["held_out_recall"]
    return f"sparse prefill visited {density:.1%} of the pairs; held-out rows kept {recall:.1%} of their attention\n"


def _http(again: dict[str, Any] | None) -> str:
    if again is None:
        return "pip install 'longreach[http]' adds OpenAI's protocols over HTTP\n"
    same = "the same answer" if again["is_same"] else f"another answer: {escape_unprintable(again['text'])}"
    return (
        f"over HTTP (POST {again['url']}/completions): {same}, {again['seconds']:.1f} s, "
        f"{again['cached_tokens']:,} tokens cached\n"
    )


@main.command()
@click.option(
    "--tokens", type=Count(), default="128k", show_default=True,
    help="Length of the document, 1k to 1M (1m: almost the whole book).",
)  # fmt: skip
@click.option("--needles", type=click.IntRange(1, 100), default=8, show_default=True, help="Facts hidden in the book.")
@click.option(
    "--positions", type=click.Choice(["dca", "yarn", "plain"]), default="dca", show_default=True,
    help="dca (dual chunk attention) and yarn stretch the trained window of 4,096 tokens; plain does not, and fails.",
)  # fmt: skip
@click.option("--sparse/--dense", default=True, show_default=True, help="Read chosen keys only, or all of them.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Which facts, and where.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def demo(tokens: int, needles: int, positions: str, sparse: bool, seed: int, as_json: bool) -> None:
    """Hide facts in a book, start a 2 x 2 cluster on this machine, and ask for them.

    Uses the small trained checkpoint that comes with the package. Exit code 1 when an answer is wrong.
    """
    from cluster.tools.demo import DemoOptions, run_demo

    with one_line_errors():
        with open_display(as_json) as display:
            report = run_demo(DemoOptions(tokens, needles, positions, sparse, seed), display)
        if as_json:
            say_json(report)
        else:
            _print_demo(report)
        if report["right"] < report["total"]:
            sys.exit(EXIT_WRONG)


def _print_demo(report: dict[str, Any]) -> None:
    from rich.console import Console

    from cluster.tools.display import in_table, plain_table

    say(f'Asked: "{report["questions"][0]["question"]}" and so on.')
    click.echo()
    table = plain_table("depth", "truth", "answer", "")
    for row in report["questions"]:
        mark = "[green]right[/]" if row["right"] else "[red]wrong[/]"
        truth, answer = (text.removeprefix("The secret code of ") for text in (row["truth"], row["answer"]))
        table.add_row(f"{row['depth']:.0%}", in_table(truth), in_table(answer[:40]), mark)
    console = Console()
    console.print(table)
    console.print(
        f"\n{report['right']} of {report['total']} right in {report['tokens']:,} tokens, "
        f"{report['positions']} positions; ready in {report['ready_s']:.1f} s\n"
        f"{_sparsity(report['sparse'])}"
        f"time to first token {report['ttft_s']:.1f} s, prefill {report['prefill_tokens_per_s']:,.0f} tokens/s, "
        f"decode {report['decode_tokens_per_s']:,.0f} tokens/s\n"
        f"{_http(report['http'])}"
        f"{report['total_s']:.0f} s in all; {report['peak_memory_bytes'] / 2**30:.1f} GiB, all processes together",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def doctor(as_json: bool) -> None:
    """Say what this machine has, what will be slow, and why.

    Exit code 1 when something is missing without which nothing runs.
    """
    from rich.console import Console

    from cluster.tools.doctor import diagnose, render

    with one_line_errors(), Console(stderr=True).status("checking this machine"):
        report = diagnose()
    if as_json:
        say_json(report.to_json())
    else:
        render(report, Console())
    if not report.ok:
        sys.exit(EXIT_WRONG)
