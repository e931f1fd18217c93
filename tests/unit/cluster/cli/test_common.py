"""Errors of one line with their exit codes, misuse of verbs, and options that verbs share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cluster.cli.common import Count, Verbs, fail, one_line_errors, open_display, sampling_options
from cluster.common.errors import ClusterError, PreflightError
from cluster.config.deployment import ConfigError
from protos.errors import UserError
from protos.node.node_check import NodeError


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`one_line_errors` sets the handler of SIGTERM for the process."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a:\n b"), 2, "longreach: error: a: b"),
        (ConfigError("x.yaml:1: key"), 2, "longreach: error: x.yaml:1: key"),
        (PreflightError("port"), 3, "longreach: error: port"),
        (ClusterError("gone"), 3, "longreach: error: gone"),
        (NodeError("node a"), 3, "longreach: error: node a"),
        (KeyboardInterrupt(), 130, "longreach: interrupted; nothing is left running"),
    ],
)
def test_what_users_can_cause_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, one_line_errors():
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_our_own_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors():
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as caught:
        fail("two\nlines", 4)
    assert caught.value.code == 4


@click.group(cls=Verbs)
def tool() -> None:
    """A tool."""


@tool.command()
@click.option("--size", type=Count())
@sampling_options
def verb(**options: Any) -> None:
    """A verb."""
    click.echo(repr(sorted(options.items())))


@tool.command()
def stopped() -> None:
    """Ends as if by Ctrl-C at a prompt."""
    raise click.Abort


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["verb", "--size", "x"], "longreach: error: Invalid value for '--size': 'x': must be a whole number such as"),
        (["verb", "--what"], "longreach: error: No such option"),
        (["nothing"], "longreach: error: No such command 'nothing' (see: tool --help)"),
        (["verb", "extra"], "longreach: error: Got unexpected extra argument"),
        (["verb", "--temperature", "hot"], "longreach: error: Invalid value for '--temperature'"),
    ],
)
def test_misuse_is_one_line(arguments: list[str], line: str) -> None:
    done = CliRunner().invoke(tool, arguments, prog_name="tool")
    assert done.exit_code == 2
    assert done.stderr.startswith(line), done.stderr
    assert done.stderr.count("\n") == 1
    assert "--help)" in done.stderr


def test_help_and_abort() -> None:
    assert "A verb." in CliRunner().invoke(tool, ["--help"]).output
    assert CliRunner().invoke(tool, ["stopped"]).exit_code == 130
    assert "Usage:" in CliRunner().invoke(tool, []).output


def test_sampling_options_have_defaults() -> None:
    done = CliRunner().invoke(tool, ["verb", "--size", "2K", "--max-tokens", "1k", "--stop", "a", "--stop", "b"])
    assert done.exit_code == 0, done.output
    for pair in (
        "('size', 2048)",
        "('max_tokens', 1000)",
        "('stop', ('a', 'b'))",
        "('temperature', None)",  # the model's files decide
        "('seed', None)",
    ):
        assert pair in done.output


def test_display_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display(quiet=False) as display:
        display.say("hello")
    with open_display(quiet=True) as display:
        display.say("hello")
    assert (capsys.readouterr().out, capsys.readouterr().err) == ("", "")
