"""What the verbs of the command line share: option groups, exit codes, errors of one line."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from cluster.common.text_format import one_line

EXIT_WRONG, EXIT_INPUT, EXIT_CLUSTER, EXIT_NOT_FOUND, EXIT_INTERRUPTED = 1, 2, 3, 4, 130


class Verbs(click.Group):
    """A command whose misuse is one line too: what was wrong, and where to read how it is used."""

    def main(
        self, args: Sequence[str] | None = None, prog_name: str | None = None, complete_var: str | None = None,
        standalone_mode: bool = True, **extra: Any,
    ) -> Any:  # fmt: skip
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.ClickException as error:
            if not standalone_mode:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2: its message is the help
                error.show()
                sys.exit(error.exit_code)
            context = getattr(error, "ctx", None)
            where = f" (see: {context.command_path} --help)" if context is not None else ""
            fail(f"{error.format_message().rstrip('.')}{where}", EXIT_INPUT)
        except click.Abort:
            if not standalone_mode:
                raise
            sys.exit(EXIT_INTERRUPTED)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


class Count(click.ParamType):
    """A human integer such as 32k or 1M."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from cluster.common.units import UnitError, parse_count

        try:
            return parse_count(value)
        except UnitError as error:
            self.fail(str(error), param, ctx)


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
    """One line on stderr, and out."""
    click.echo(f"longreach: error: {one_line(error)}", err=True)
    sys.exit(code)


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """How to sample and when to stop; the same for every verb that asks."""
    options = [
        click.option("--max-tokens", type=Count(), default="256", show_default=True, help="Most tokens of an answer."),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option("--top-k", type=int, default=0, help="Keep the K likeliest tokens (0: all)."),
        click.option("--top-p", type=float, default=1.0, help="Keep the likeliest tokens up to this mass."),
        click.option("--min-p", type=float, default=0.0, help="Drop tokens below this share of the likeliest."),
        click.option("--repetition-penalty", type=float, default=1.0, help="Above 1 discourages repetition."),
        click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same samples."),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer at this text (repeatable)."),
        click.option("--stop-token-id", type=int, multiple=True, help="End the answer at this id (repeatable)."),
        click.option("--ignore-eos", is_flag=True, help="Do not stop at the model's end token."),
        click.option("--logprobs", type=int, metavar="K", help="Report log-probabilities of the K best tokens."),
        click.option("--thinking/--no-thinking", default=None, help="enable_thinking for the chat template."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def open_display(quiet: bool) -> Any:
    """A Display on stderr."""
    from rich.console import Console

    from cluster.tools.display import Display

    return Display(Console(stderr=True), quiet=quiet)
