"""What the verbs of the command line share: option groups, exit codes, errors of one line."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from cluster.common.logs import escape_warnings
from cluster.common.text_format import escape_controls, escape_unprintable, one_line
from protos.errors import InvalidRequest
from protos.jobs.constraint import Constraint
from protos.jobs.logit_bias import TokenBias, read_logit_bias
from protos.jobs.sampling import OPTIONS

if TYPE_CHECKING:
    from cluster.tools.display import Display

_SLOW_S = 2.0  # work that takes less shows no progress
EXIT_WRONG, EXIT_INPUT, EXIT_CLUSTER, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


class Verbs(click.Group):
    """A group of commands whose misuse is one line too: what was wrong, and where to read how it is used."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        escape_warnings()
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **extra)
        try:
            code = run(*args, standalone_mode=False, **extra)
        except click.ClickException as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2: its message is the help
                error.show()
                sys.exit(error.exit_code)
            context = getattr(error, "ctx", None)
            where = f" (see: {context.command_path} --help)" if context is not None else ""
            fail(f"{error.format_message().rstrip('.')}{where}", EXIT_INPUT)
        except click.Abort:
            sys.exit(EXIT_INTERRUPTED)
        sys.exit(code if isinstance(code, int) else 0)


class Count(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # not generic before click 8.2
    """A count as people write it, such as 32k or 1M."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from cluster.common.units import UnitError, parse_count

        try:
            return parse_count(value)
        except UnitError as error:
            self.fail(str(error), param, ctx)


class SchemaFile(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """The path of a file with a JSON schema, which the answer must match."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Constraint:
        if isinstance(value, Constraint):
            return value
        try:
            return Constraint("json_schema", Path(value).read_text("utf-8"))
        except (OSError, ValueError) as error:
            self.fail(f"{value}: cannot be read as UTF-8 text ({one_line(error, 100)})", param, ctx)
        except InvalidRequest as error:
            self.fail(f"{value}: {error}", param, ctx)


class BiasWord(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """`ID=BIAS`: what is added to the logit of a token."""

    name = "bias"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> TokenBias:
        if isinstance(value, TokenBias):
            return value
        token, _, bias = str(value).partition("=")
        try:
            (found,) = read_logit_bias({token: float(bias)})
        except ValueError:
            self.fail(f"{value!r}: must be ID=BIAS, with a token id and a number from -100 to 100", param, ctx)
        return found


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what users can cause into one line on stderr and an exit code; our own bugs keep their traceback."""
    from cluster.common.errors import ClusterError
    from protos.errors import UserError
    from protos.node.node_check import NodeError

    # a polite kill is an interrupt too: what was started gets stopped
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (ClusterError, NodeError) as error:
        fail(error, EXIT_CLUSTER)
    except UserError as error:
        fail(error, EXIT_INPUT)
    except KeyboardInterrupt:
        click.echo("longreach: interrupted; nothing is left running", err=True)
        sys.exit(EXIT_INTERRUPTED)


def fail(error: Exception | str, code: int) -> NoReturn:
    """Print one line on stderr and exit with `code`."""
    click.echo(f"longreach: error: {one_line(error)}", err=True)
    sys.exit(code)


def say(text: str, err: bool = False, bold: bool = False) -> None:
    """Print one line; whatever in it came from outside cannot break it or control a terminal."""
    text = escape_unprintable(text)
    click.echo(click.style(text, bold=True) if bold else text, err=err)


def say_text(text: str, dim: bool = False) -> None:
    """Print a text of several lines on stdout: as it is into a file or pipe, with escapes on a terminal."""
    if sys.stdout.isatty():
        text = escape_controls(text)
        click.echo(click.style(text, dim=True) if dim else text)
    else:
        click.echo(text, color=True)  # else click would take colours out of it


def say_json(value: object) -> None:
    """Print a value as JSON on one line; on a terminal, characters that could control it are escaped in JSON's way."""
    text = json.dumps(value, ensure_ascii=False)
    if sys.stdout.isatty():
        text = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
    click.echo(text)


def as_shown(text: str) -> str:
    """Return a text of several lines as stdout gets it."""
    return escape_controls(text) if sys.stdout.isatty() else text


def warn(text: str) -> None:
    """Print a warning of one line on stderr."""
    click.echo(f"longreach: warning: {one_line(text)}", err=True)


# what the command line adds to the declarations of the options
_SPELLINGS = {
    "stop_token_ids": "--stop-token-id", "enable_thinking": "--thinking/--no-thinking",
    "structured_outputs": "--json-schema",
}  # fmt: skip
_ADDED: dict[str, dict[str, Any]] = {
    "max_tokens": {"type": Count(), "show_default": True},
    "ignore_eos": {"is_flag": True},
    "logprobs": {"metavar": "K"},
    "structured_outputs": {"type": SchemaFile(), "metavar": "FILE"},
    "thinking_budget": {"type": Count()},
    "logit_bias": {"type": BiasWord(), "metavar": "ID=BIAS"},
}


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of sampling and stopping, named as in `OPTIONS`; the same for every verb that asks."""
    for name, option in reversed(OPTIONS.items()):
        spelling = _SPELLINGS.get(name, f"--{name.replace('_', '-')}")
        values = {"type": option.kind, "default": option.default, "multiple": option.is_list, "help": option.meaning}
        command = click.option(spelling, name, **(values | _ADDED.get(name, {})))(command)
    return command


def open_display(quiet: bool) -> Display:
    """Return a Display on stderr."""
    from rich.console import Console

    from cluster.tools.display import Display

    return Display(Console(stderr=True), quiet=quiet)


@contextmanager
def slow_progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Give a callback (what is done, how much, of how much) that shows progress on stderr after two seconds.

    What was told last is shown then, even if nothing more is told; any thread may call it.
    """
    lock = threading.Lock()
    last: tuple[str, int, int] | None = None
    with ExitStack() as opened:
        display: Display | None = None

        def begin() -> None:
            nonlocal display
            with lock:
                display = opened.enter_context(open_display(quiet))
                if last is not None:
                    display.amount(*last)

        def show(phase: str, done: int, total: int) -> None:
            nonlocal last
            with lock:
                last = (phase, done, total)
                if display is not None:
                    display.amount(*last)

        timer = threading.Timer(_SLOW_S, begin)
        timer.daemon = True
        timer.start()
        try:
            yield show
        finally:
            timer.cancel()
            timer.join()
