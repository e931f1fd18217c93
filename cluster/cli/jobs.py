"""The verbs that talk to a running head: submit, wait, stream, jobs, cancel, status.

Exit codes: 0 ok; 1 a job failed, was cancelled, or has not ended in time; 2 bad input; 3 the head cannot be reached or
the cluster failed; 4 no such job or document; 130 interrupted (jobs go on).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cluster.cli import output
from cluster.cli.common import (
    EXIT_CLUSTER,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    EXIT_NOT_FOUND,
    EXIT_WRONG,
    fail,
    sampling_options,
    say,
    say_json,
)
from cluster.client import errors
from cluster.client.client import Client
from cluster.client.connection import DEFAULT_ADDRESS, DEFAULT_DATA_DIR, ConnectionOptions, state_connection
from cluster.client.jobs import Job

# of errors of the client; EXIT_CLUSTER of all others
_EXIT_CODES = {
    errors.NotFound: EXIT_NOT_FOUND, errors.JobFailed: EXIT_WRONG, errors.InvalidRequest: EXIT_INPUT,
    errors.Conflict: EXIT_INPUT, errors.TlsError: EXIT_INPUT, errors.Unauthenticated: EXIT_INPUT,
}  # fmt: skip
_STATES = ("queued", "prefilling", "decoding", "recovering", "succeeded", "failed", "cancelled")


def head_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of the head's address and TLS, and of printing."""
    options = [
        click.option(
            "--address", metavar="HOST:PORT",
            help="The head. Default: LONGREACH_ADDRESS, else the one `longreach up` started, else 127.0.0.1:7777.",
        ),
        click.option("--data-dir", type=click.Path(path_type=Path), help="Data directory of the head on this machine."),
        click.option(
            "--ca-file", metavar="PEM",
            help="Authority or certificate of the head; turns TLS on. Default: LONGREACH_CA_FILE, or what "
            "`longreach up` wrote.",
        ),
        click.option("--cert-file", metavar="PEM", help="Of this client, for mutual TLS; LONGREACH_CERT_FILE."),
        click.option("--key-file", metavar="PEM", help="Of its key; LONGREACH_KEY_FILE."),
        click.option("--server-name", metavar="NAME", help="In the head's certificate, when the address is none."),
        click.option(
            "--allow-plaintext-key", is_flag=True, default=None,
            help="Send the API key (LONGREACH_API_KEY) to another machine without TLS.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def find_head(options: dict[str, Any]) -> tuple[str, ConnectionOptions]:
    """Address and TLS of the head. Raises Unavailable when `--data-dir` was given and no head is ready there."""
    given: Any = {name: options[name] for name in ConnectionOptions.__annotations__ if options.get(name) is not None}
    if address := options["address"]:
        return address, given
    if options["data_dir"] is not None:
        return state_connection(options["data_dir"], given)
    if from_environment := os.environ.get("LONGREACH_ADDRESS"):
        return from_environment, given
    try:
        return state_connection(DEFAULT_DATA_DIR, given)
    except errors.Unavailable:
        return DEFAULT_ADDRESS, given


@contextmanager
def open_client(options: dict[str, Any], way_out: str = "") -> Iterator[Client]:
    """Open a client by the options of `head_options`; its errors become one line and an exit code.

    Args:
        way_out: what else to do where no head can be reached.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # a failed handshake is our line to write, not gRPC's
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        address, connection = find_head(options)
        with Client(address, **connection) as client:
            yield client
    except errors.LongreachError as error:
        later = f" (try again in {error.retry_after_s:.0f} s)" if isinstance(error, errors.Busy) else ""
        if way_out and isinstance(error, errors.Unavailable):
            later = f"; {way_out}"
        fail(f"{error}{later}", _EXIT_CODES.get(type(error), EXIT_CLUSTER))
    except BrokenPipeError:  # `longreach stream ID | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_WRONG)
    except KeyboardInterrupt:
        click.echo("longreach: interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)


@click.command()
@click.option(
    "--document", "documents", type=click.Path(path_type=Path), multiple=True, metavar="FILE|FOLDER|ID",
    help="A text, PDF, folder, zip ..., or the id of one of `longreach docs`; it comes first in the prompt "
    "(repeatable: files in this order, as one document).",
)  # fmt: skip
@click.option("--question", multiple=True, help="A question about the document (repeatable: they share its prefill).")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="A raw prompt, tokenised as it is.")
@click.option("--token-ids", type=click.Path(path_type=Path), help="A JSON file with a list of token ids.")
@sampling_options
@click.option("--priority", type=int, default=0, show_default=True, help="Higher runs earlier.")
@click.option("--deadline", type=float, metavar="SECONDS", help="The job fails by itself after this time.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label to find it by (repeatable).")
@click.option("--idempotency-key", metavar="KEY", help="The same key and request again give the same job.")
@click.option("--wait", "then_wait", is_flag=True, help="Wait for the answers and print them.")
@click.option("--stream", "then_stream", is_flag=True, help="Print tokens as they come.")
@head_options
def submit(**options: Any) -> None:
    """Queue a job on a running head and print its id; the job goes on without this command.

    \b
    longreach submit --document report.txt --question "What was decided?" --question "By whom?" --wait
    longreach submit --document project/ --question "Where are sockets closed?" --stream
    longreach submit --document doc_0123456789abcdef0123456789abcdef --question "What was agreed?" --wait
    longreach submit --prompt-file prompt.txt --max-tokens 64 --label team=law
    """
    if options["then_wait"] and options["then_stream"]:
        fail("--wait, --stream: give one of them", EXIT_INPUT)
    with open_client(options) as client:
        job = output.submit_given(client, options | {"labels": parse_labels(options["labels"])})
        if not options["then_wait"] and not options["then_stream"]:
            if options["as_json"]:
                say_json(job.data.to_json())
            else:
                say(job.id)
            return
        say(job.id, err=True)
        if options["then_stream"]:
            output.stream_job(job, 0, options["as_json"])
        else:
            output.print_answers(output.wait_job(job, None), options["as_json"])


@click.command()
@click.argument("job_id", metavar="ID")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="SECONDS", help="Give up after this time (exit 1).")
@head_options
def wait(job_id: str, timeout: float | None, **options: Any) -> None:
    """Wait until a job has ended and print its answers."""
    with open_client(options) as client:
        output.print_answers(output.wait_job(client.job(job_id), timeout), options["as_json"])


@click.command()
@click.argument("job_id", metavar="ID")
@click.option("--after", type=click.IntRange(min=0), default=0, show_default=True, help="Begin after this token.")
@head_options
def stream(job_id: str, after: int, **options: Any) -> None:
    """Print a job's tokens as they come; Ctrl-C leaves, the job goes on.

    With several questions, whole lines come out with the number of their question in front.
    With --json, one event a line.
    """
    with open_client(options) as client:
        output.stream_job(client.job(job_id), after, options["as_json"])


@click.command()
@click.option("--state", "states", multiple=True, type=click.Choice(_STATES), help="Only these states (repeatable).")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only with this label (repeatable).")
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many.")
@head_options
def jobs(states: tuple[str, ...], labels: tuple[str, ...], limit: int, **options: Any) -> None:
    """List jobs, newest first."""
    with open_client(options) as client:
        output.print_jobs(list(client.jobs(states, parse_labels(labels), limit)), options["as_json"])


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="ID...")
@head_options
def cancel(job_ids: tuple[str, ...], **options: Any) -> None:
    """Cancel jobs; one that has ended stays as it is. Unknown ids are reported after the others (exit 4)."""
    cancelled: list[Job] = []
    missing: errors.NotFound | None = None
    with open_client(options) as client:
        for job_id in job_ids:
            try:
                cancelled.append(client.job(job_id).cancel())
            except errors.NotFound as error:
                missing = missing or error
            else:
                if not options["as_json"]:
                    say(f"{job_id} {cancelled[-1].state}")
        if options["as_json"]:
            say_json([job.data.to_json() for job in cancelled])
        if missing is not None:
            raise missing


@click.command()
@head_options
def status(**options: Any) -> None:
    """Show the cluster's stages, queue and memory."""
    with open_client(options) as client:
        output.print_status(client.status(), client.address, options["as_json"])


def parse_labels(pairs: Sequence[str]) -> dict[str, str]:
    """Return `KEY=VALUE` words as a mapping; exits with 2 on anything else."""
    labels = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            fail(f"--label: {pair!r}: must be KEY=VALUE", EXIT_INPUT)
        labels[key] = value
    return labels


VERBS: tuple[click.Command, ...] = (submit, wait, stream, jobs, cancel, status)
