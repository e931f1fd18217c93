"""Input files and output of the job verbs: answers, tokens as they come, tables."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import click

from cluster.cli.common import (
    EXIT_INTERRUPTED,
    EXIT_WRONG,
    as_shown,
    fail,
    open_display,
    say,
    say_json,
    say_text,
    slow_progress,
)
from cluster.client.client import Client
from cluster.client.errors import InvalidRequest, JobFailed
from cluster.client.ingest.source import DocumentText, read_source
from cluster.client.ingest.tree import Progress as ProgressCall
from cluster.client.jobs import Job
from cluster.client.models import ClusterStatus, Document, JobEnded, ProgressEvent, TokenCount, TokenEvent
from cluster.client.requests import too_large
from cluster.common.text_format import escape_unprintable
from cluster.tools.token_ids import parse_token_ids
from protos.jobs.limits import MAX_REQUEST_BYTES
from protos.jobs.sampling import OPTIONS

_ID = re.compile("doc_[0-9a-f]{32}")
_MAX_LINE = 1 << 16  # characters of a line kept back until it ends
_ANY_WIDTH = 1 << 14  # columns; wider than any table


def submit_given(client: Client, options: dict[str, Any]) -> Job:
    """Queue the job that the options of `submit` describe. Raises LongreachError."""
    prompt_file, ids_file = options["prompt_file"], options["token_ids"]
    extra: dict[str, Any] = {name: options[name] for name in (*OPTIONS, "priority", "labels", "idempotency_key")}
    return client.submit(
        _document(client, options["documents"], options["as_json"]),
        list(options["question"]) or None,
        prompt=None if prompt_file is None else _read(prompt_file, bytes.decode),
        token_ids=None if ids_file is None else _read(ids_file, parse_token_ids),
        deadline_s=options["deadline"],
        **extra,
    )


def _document(client: Client, sources: Sequence[Path], quiet: bool) -> Document | None:
    """Return the document that the sources name or become; None when there is none.

    Raises LongreachError, and before anything is sent when they cannot be read.
    """
    if not sources:
        return None
    if len(sources) == 1 and _ID.fullmatch(str(sources[0])) and not sources[0].exists():
        return client.documents.get(str(sources[0]))
    with slow_progress(quiet) as progress:
        text = read_paths(sources, None, progress)
        return client.documents.add(text, progress=progress)


def read_paths(sources: Sequence[Path], encoding: str | None, progress: ProgressCall) -> DocumentText:
    """Return the text of files and folders as one document, and say on stderr how they were read.

    Raises LongreachError.
    """
    text = read_source(list(sources), encoding, progress)
    for note in text.notes:
        say(note if len(sources) > 1 else f"{text.name}: {note}", err=True)
    return text


def _read(path: Path, parse: Callable[[bytes], Any]) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_REQUEST_BYTES + 1)  # no more of a file without end either
        if len(data) > MAX_REQUEST_BYTES:
            raise too_large(str(path), max(len(data), path.stat().st_size))
        return parse(data)
    except InvalidRequest:
        raise
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise InvalidRequest(f"{path}: {error}") from error


@contextmanager
def detaching(job: Job, command: Callable[[], str]) -> Iterator[None]:
    """On Ctrl-C leave the job alone, say how to come back, and exit with 130."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(err=True)
        say(f"longreach: detached; {job.id} goes on. Come back with: {command()}", err=True)
        sys.exit(EXIT_INTERRUPTED)


def wait_job(job: Job, timeout_s: float | None) -> Job:
    """Wait until a job has ended and return it; exits with 1 when the time is over."""
    with detaching(job, lambda: f"longreach wait {job.id}"):
        job.wait(timeout_s)
        if not job.done:
            fail(f"{job.id}: {job.state} after {timeout_s:g} s; wait longer, or: longreach cancel {job.id}", EXIT_WRONG)
        return job


def print_answers(job: Job, as_json: bool) -> None:
    """Print an ended job. Raises JobFailed when it did not succeed."""
    if as_json:
        say_json(job.data.to_json())
    elif job.data.read and job.state == "succeeded":
        say(f"{job.data.document_id}: has been read")
    else:
        for answer in () if job.data.read else job.answers:
            if answer.question and len(job.answers) > 1:
                say(answer.question, bold=True)
            if answer.reasoning:
                say_text(answer.reasoning, dim=True)
            if job.data.has_text:
                say_text(answer.text.strip())
            else:
                click.echo(list(answer.token_ids))
    _check(job)


def _check(job: Job) -> None:
    if job.state != "succeeded":
        raise JobFailed(job)


class TokenPrinter:
    """Writes tokens to stdout: one answer as it comes; of several, whole lines with the question's number.

    Reasoning comes before the answer in lines of its own, dim on a terminal; of several questions as `[1 reasoning]`.
    """

    def __init__(self, questions: int, has_text: bool = True) -> None:
        self._many = questions > 1
        self._has_text = has_text
        self._lines: dict[tuple[int, str], str] = {}  # unfinished, by question and part
        self._ends_line = True
        self._part = "answer"

    def push(self, event: TokenEvent) -> None:
        """Write the text of a token, or its id where there is none; of several questions, only whole lines."""
        token = event.token
        if not self._has_text:
            self._write(f"{token.token_id} ")
            return
        parts = {"reasoning": token.reasoning, "answer": token.answer} if token.part else {"answer": token.text}
        for part, text in parts.items():
            if text and self._many:
                self._push_lines(event.question, part, text)
            elif text:
                if part != self._part and not self._ends_line:
                    self._write("\n")
                self._part = part
                self._write(text, dim=part == "reasoning")

    def _push_lines(self, question: int, part: str, text: str) -> None:
        if part == "answer":
            self._end_line(question, "reasoning")
        *whole, rest = (self._lines.get((question, part), "") + text).split("\n")
        for line in whole:
            self._write_line(question, part, line)
        if len(rest) > _MAX_LINE:
            self._write_line(question, part, rest)
            rest = ""
        self._lines[question, part] = rest

    def _end_line(self, question: int, part: str) -> None:
        if line := self._lines.pop((question, part), ""):
            self._write_line(question, part, line)

    def _write_line(self, question: int, part: str, line: str) -> None:
        is_reasoning = part == "reasoning"
        self._write(f"[{question + 1}{' reasoning' if is_reasoning else ''}] {line}\n", dim=is_reasoning)

    def finish(self) -> None:
        """Write unfinished lines; stdout then ends with a newline."""
        for question, part in sorted(self._lines):
            self._end_line(question, part)
        if not self._ends_line:
            self._write("\n")
        sys.stdout.flush()

    def _write(self, text: str, dim: bool = False) -> None:
        text = as_shown(text)
        sys.stdout.write(click.style(text, dim=True) if dim and sys.stdout.isatty() else text)
        self._ends_line = text.endswith("\n")


class DeferredInterrupts:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, inside `deferred` at its end: what is shown and counted agree."""

    def __init__(self) -> None:
        self._is_deferred = self._is_pending = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Raise an interrupt that comes inside the block at its end."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self._is_pending:
            raise KeyboardInterrupt

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        again, self._is_pending = self._is_pending, True
        if again or not self._is_deferred:  # a second one also ends a write that nobody reads
            raise KeyboardInterrupt


def stream_job(job: Job, after: int, as_json: bool) -> None:
    """Follow a job to its end; exits with 130 on Ctrl-C. Raises JobFailed when it did not succeed."""
    printer = TokenPrinter(len(job.answers), job.data.has_text)
    last = after
    interrupts = DeferredInterrupts()

    with detaching(job, lambda: f"longreach stream {job.id} --after {last}"):
        try:
            with open_display(as_json) as display:
                for event in job.stream(after):
                    with interrupts.deferred():
                        if as_json:
                            say_json(_event_json(event))
                        elif isinstance(event, ProgressEvent) and last == after:
                            at = event.progress
                            display.tokens("reading", at.processed, at.total, at.eta_ms)
                        elif isinstance(event, TokenEvent):
                            display.clear()  # from here on the terminal belongs to the answer
                            printer.push(event)
                        if isinstance(event, TokenEvent):
                            last = event.number
                            sys.stdout.flush()
        finally:
            printer.finish()
    _check(job)


def _event_json(event: ProgressEvent | TokenEvent | JobEnded) -> dict[str, Any]:
    names = {ProgressEvent: "progress", TokenEvent: "token", JobEnded: "ended"}
    return {"event": names[type(event)]} | asdict(event)


def print_jobs(jobs: Sequence[Job], as_json: bool) -> None:
    """Print a table of jobs, or one JSON list."""
    if as_json:
        say_json([job.data.to_json() for job in jobs])
        return
    rows = []
    for job in jobs:
        at = job.progress
        read = f"{at.processed:,} of {at.total:,}" if at.total and not job.done else ""
        if job.done and job.answers:
            read = f"{max(answer.prompt_tokens for answer in job.answers):,}"
        labels = " ".join(f"{key}={value}" for key, value in sorted(job.labels.items()))
        rows.append((job.id, job.state, _when(job.data.created), str(len(job.answers)), read, labels))
    _print_table(("id", "state", "created", "answers", "tokens read", "labels"), rows)


def wait_read(job: Job, quiet: bool) -> None:
    """Wait with a bar until a document has been read. Raises JobFailed; exits with 130 on Ctrl-C."""
    with detaching(job, lambda: f"longreach wait {job.id}"), open_display(quiet) as display:
        for event in job.stream():
            if isinstance(event, ProgressEvent):
                at = event.progress
                display.tokens("reading", at.processed, at.total, at.eta_ms)
    _check(job)


def print_documents(documents: Sequence[Document], as_json: bool) -> None:
    """Print a table of documents, or one JSON list."""
    from cluster.common.units import format_bytes

    if as_json:
        say_json([asdict(document) for document in documents])
        return
    rows = [
        (d.id, d.name, _count(d.tokens), format_bytes(d.size_bytes), _stored(d), _when(d.used or d.created),
         "pinned" if d.pinned else "", "never" if d.pinned else _when(d.expires))
        for d in documents
    ]  # fmt: skip
    _print_table(("id", "name", "tokens", "size", "stored KV", "last use", "pinned", "expires"), rows)


def print_document(document: Document, as_json: bool) -> None:
    """Print all that is known of a document, a line each, or one JSON object."""
    from cluster.common.units import format_bytes

    if as_json:
        say_json(asdict(document))
        return
    rows = {
        "id": document.id, "name": document.name, "size": format_bytes(document.size_bytes),
        "tokens": _count(document.tokens) or "not counted yet", "stored KV": _stored(document) or "none",
        "may grow to": f"{document.scale_len:,} tokens" if document.scale_len else "",
        "created": _when(document.created), "last use": _when(document.used),
        "expires": "never, it is pinned" if document.pinned else _when(document.expires),
        "appended to": document.parent, "taken from": f"SHA-256 {document.source_hash}" if document.source_hash else "",
        "kernels": document.kernel_family, "shared": "with every key" if document.shared else "",
    }  # fmt: skip
    width = max(map(len, rows))
    for name, value in rows.items():
        if value:
            say(f"{name:<{width}}  {value}")


def print_token_counts(names: Sequence[str], counts: Sequence[TokenCount], counter: str, as_json: bool) -> None:
    """Print a table of token counts, or one JSON list; exits with 1 when a document does not fit.

    Args:
        counter: who has counted.
    """
    from cluster.common.units import format_bytes

    if as_json:
        pairs = zip(names, counts, strict=True)
        say_json([{"source": name} | asdict(c) | {"fits": c.fits, "counted_by": counter} for name, c in pairs])
    else:
        rows = [
            (name, f"{c.tokens:,}", format_bytes(c.size_bytes), f"{c.tokens / max(1, c.max_model_len):.1%}",
             "yes" if c.fits else "no") for name, c in zip(names, counts, strict=True)
        ]  # fmt: skip
        _print_table(("source", "tokens", "size", f"of {counts[0].max_model_len:,}", "fits"), rows)
        say(f"counted by the {counter}; a question and its answer need room too", err=True)
    if not all(count.fits for count in counts):
        sys.exit(EXIT_WRONG)


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _stored(document: Document) -> str:
    from cluster.common.units import format_bytes

    return f"{document.stored_tokens:,} tokens, {format_bytes(document.stored_bytes)}" if document.stored_bytes else ""


def print_status(status: ClusterStatus, address: str, as_json: bool) -> None:
    """Print the cluster in two lines and a table of its stages, or one JSON object."""
    from cluster.common.units import format_bytes
    from cluster.tools.display import format_duration

    if as_json:
        say_json(asdict(status) | {"address": address})
        return
    where = f"{address}, HTTP at {status.http_url}" if status.http_url else address
    say(f"{status.model} at {where}, version {status.version}, up {format_duration(status.uptime_s)}")
    size, quota = format_bytes(status.kv_store_bytes), status.kv_store_max_bytes
    stored = f"stored KV {size} of {format_bytes(quota)}; " if quota and not status.own_only else ""
    used, whose = ("", " of this key") if status.own_only else (f"{status.kv_usage:.0%} of ", "")
    jobs = f"{status.running} running, {status.queued} queued{whose}"  # numbers only
    kv = f"KV {used}{status.kv_tokens:,} tokens; {stored}"
    click.echo(f"{jobs}; {kv}contexts up to {status.max_model_len:,} tokens\n")
    if recoveries := status.repairs + status.full_restarts:
        kinds = f"by replacing stages {status.repairs} times, by a full restart {status.full_restarts} times"
        last = format_duration(status.last_recovery_s)
        click.echo(f"recovered {recoveries} times, {kinds}; the last one took {last}\n")
    if status.problem:
        click.echo(f"not serving: {escape_unprintable(status.problem)}\n")
    rows = [(str(s.stage), str(s.rank), s.state, f"{s.steps_done:,}", format_bytes(s.resident_bytes))
            for s in status.stages]  # fmt: skip
    _print_table(("stage", "rank", "state", "steps", "memory"), rows)


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns; ids must stay whole to be copied, so a line is as wide as its cells."""
    from rich.console import Console

    from cluster.tools.display import plain_table

    table = plain_table(*columns)
    for row in rows:
        table.add_row(*map(escape_unprintable, row))
    Console(width=_ANY_WIDTH, markup=False, emoji=False, highlight=False).print(table)
