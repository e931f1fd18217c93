"""The commands of `python -m cluster.bench` about the HTTP server; they need the extra `test`."""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from cluster.bench.resumable import Results
from protos.node.environment import write_result

HTTP_COMMANDS: list[click.Command] = []
_PIECE = 500  # damaged requests of a row
_OUT = click.option("--json", "out", type=click.Path(path_type=Path), help="Also write the result to this file.")
# short answers, so that thousands of requests have time; enough queued jobs for those that nobody follows
_FUZZED: dict[str, Any] = {
    "model": {"max_model_len": "1k"}, "server": {"http_max_tokens": 16, "max_queued_jobs": 4096},
}  # fmt: skip


def _say(line: str) -> None:
    click.echo(line, err=True)


@click.command("http-fuzz")
@click.option("--cases", type=click.IntRange(0), default=5000, show_default=True, help="Of schemathesis, in all.")
@click.option("--mutations", type=click.IntRange(0), default=10_000, show_default=True, help="Damaged requests.")
@click.option("--seed", default=1, show_default=True, help="Of both.")
@click.option(
    "--resume", type=click.Path(path_type=Path), help="A file of JSON lines: pieces it has are not run again."
)
@_OUT
def http_fuzz(out: Path | None, cases: int, mutations: int, seed: int, resume: Path | None) -> None:
    """Send what nobody should to every route of a head over the demo model: see docs/http.md."""
    what = "requests out of the OpenAPI document, and damaged ones of every POST route"
    result = {"what": what, "seed": seed} | _fuzz(cases, mutations, seed, resume)
    click.echo(write_result(out, result))
    if result["problems"]:
        raise SystemExit(1)


def _fuzz(cases: int, mutations: int, seed: int, resume: Path | None) -> dict[str, Any]:
    from cluster.bench.http.fuzz import read_document, schema_pieces, send_cases, send_mutations, timed
    from cluster.bench.http.rig import HttpHead, ask, cancel_all, make_objects, wait_until_idle

    results = Results(resume, {"cases": cases, "mutations": mutations, "seed": seed})
    done = {row["piece"] for row in results.rows}
    with tempfile.TemporaryDirectory() as root, closing(HttpHead(Path(root), **_FUZZED)) as head:
        head.start()
        head.wait_until_running()
        objects, document = make_objects(head.url), read_document(head.url)
        expected = ask(head.url)
        for method, path, count in schema_pieces(document, cases) if cases else ():
            piece = f"{method} {path}"
            if piece not in done:
                row = timed(lambda: send_cases(head.url, document, objects, method, path, count, seed))  # noqa: B023
                results.add({"piece": piece, "part": "schema"} | row)
                _say(f"{piece}: {row['requests']} requests in {row['seconds']} s, {len(row['problems'])} problems")
        for first in range(0, mutations, _PIECE):
            piece = f"mutations from {first}"
            if piece not in done:
                numbers = range(first, min(first + _PIECE, mutations))
                row = timed(lambda: send_mutations(head.url, objects, numbers, seed))  # noqa: B023
                results.add({"piece": piece, "part": "mutated"} | row)
                _say(f"{piece}: {row['requests']} requests in {row['seconds']} s, {len(row['problems'])} problems")
        cancel_all(head.url)
        idle_s = wait_until_idle(head.url, head.pid)
        problems = [] if ask(head.url) == expected else ["the head answers differently afterwards"]
    return _summary(results.rows, problems) | {"idle_after_s": idle_s}


def _summary(rows: list[dict[str, Any]], problems: list[str]) -> dict[str, Any]:
    from cluster.bench.http.fuzz import Tally

    result: dict[str, Any] = {}
    for part in ("schema", "mutated"):
        tally = Tally()
        of_part = [row for row in rows if row["part"] == part]
        for row in of_part:
            tally.merge(row)
        shown = tally.as_row()
        problems += shown.pop("problems")
        result[part] = shown | {"seconds": round(sum(row["seconds"] for row in of_part), 1)}
        if part == "schema":
            result[part]["operations"] = len(of_part)
    return result | {"problems": problems}


@click.command("http-overhead")
@click.option("--requests", type=click.IntRange(1), default=200, show_default=True, help="Of one token, by client.")
@click.option("--answers", type=click.IntRange(1), default=5, show_default=True, help="Long ones, by client.")
@click.option("--tokens", type=click.IntRange(2), default=1024, show_default=True, help="Of a long answer.")
@_OUT
def http_overhead(out: Path | None, requests: int, answers: int, tokens: int) -> None:
    """What HTTP adds to a request and to a streamed token over gRPC: httpx, openai and our client in turns."""
    from cluster.bench.http.overhead import measure_overhead
    from cluster.bench.http.rig import HttpHead

    with tempfile.TemporaryDirectory() as root, closing(HttpHead(Path(root))) as head:
        head.start()
        head.wait_until_running()
        found = measure_overhead(head, requests, answers, tokens, _say)
    what = "requests of one token and streamed tokens, over HTTP and over gRPC"
    result = {"what": what, "requests": requests, "answers": answers, "tokens": tokens} | found
    click.echo(write_result(out, result))
    if not result["met"]:
        raise SystemExit(1)


HTTP_COMMANDS += [http_fuzz, http_overhead]
