"""Errors of one line with their exit codes, misuse of verbs, and options that verbs share."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from cluster.cli import common
from cluster.cli.common import (
    Count,
    Verbs,
    fail,
    one_line_errors,
    open_display,
    sampling_options,
    say,
    say_json,
    say_text,
    warn,
)
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
        "('structured_outputs', None)",
    ):
        assert pair in done.output


def test_schema_of_a_file(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"type": "integer"}')
    bad.write_text("[")
    done = CliRunner().invoke(tool, ["verb", "--json-schema", str(good)])
    assert """Constraint(kind='json_schema', text='{"type": "integer"}')""" in done.output
    for path, problem in ((bad, "structured_outputs.json: is no JSON"), (tmp_path / "none", "cannot be read as UTF-8")):
        done = CliRunner().invoke(tool, ["verb", "--json-schema", str(path)], prog_name="tool")
        assert done.exit_code == 2
        assert problem in done.stderr
        assert done.stderr.count("\n") == 1


def test_biases_and_budgets() -> None:
    words = ["verb", "--logit-bias", "5=-100", "--logit-bias", "7=1.5", "--thinking-budget", "2k", "--min-tokens", "3"]
    done = CliRunner().invoke(tool, words)
    for pair in (
        "('logit_bias', (TokenBias(token_id=5, bias=-100.0), TokenBias(token_id=7, bias=1.5)))",
        "('thinking_budget', 2000)", "('min_tokens', 3)",
    ):  # fmt: skip
        assert pair in done.output
    for word in ("5", "5=", "=1", "5=101", "a=1", "5=nan"):
        done = CliRunner().invoke(tool, ["verb", "--logit-bias", word], prog_name="tool")
        assert done.exit_code == 2
        assert f"{word!r}: must be ID=BIAS, with a token id and a number from -100 to 100" in done.stderr


def test_display_is_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with open_display(quiet=False) as display:
        display.say("hello")
    with open_display(quiet=True) as display:
        display.say("hello")
    assert (capsys.readouterr().out, capsys.readouterr().err) == ("", "")


EVIL = "a\x1b]0;owned\x07\x9b2J\u202e\u200b\u200d\x7f"
ESCAPED = r"a\x1b]0;owned\x07\x9b2J\u202e\u200b\u200d\x7f"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_printed_of_texts_from_outside(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    say(f"{EVIL}\nb")
    say_text(f"{EVIL}\n\tb\x1b[31m")
    say_json({"text": f"{EVIL}\n\U000e0001"})
    line, first, second, data = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert line == rf"{ESCAPED}\nb"
    if is_terminal:
        assert first == ESCAPED.replace(r"\u200d", "\u200d")
        assert second == "\tb" + r"\x1b[31m"
        assert data.isprintable()
    else:
        assert (first, second) == (EVIL, "\tb\x1b[31m")
        assert data == json.dumps({"text": f"{EVIL}\n\U000e0001"}, ensure_ascii=False)
    assert json.loads(data) == {"text": f"{EVIL}\n\U000e0001"}


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    warn(f"{EVIL}\nb")
    assert capsys.readouterr().err == f"longreach: warning: {ESCAPED} b\n"


def test_progress_comes_with_work_that_is_slow(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with common.slow_progress(False) as progress:
        progress("sending", 1 << 20, 3 << 20)
    monkeypatch.setattr(common, "_SLOW_S", 0.05)
    with common.slow_progress(False) as progress:
        progress("reading a.pdf", 0, 0)
        time.sleep(0.5)
        progress("sending", 2 << 20, 3 << 20)
        progress("reading files", 7, 0)
    assert capsys.readouterr().err == "reading a.pdf\nsending: 2MiB of 3MiB\nreading files: 7\n"
    with common.slow_progress(True) as progress:
        progress("sending", 1, 2)
        time.sleep(0.2)
    assert capsys.readouterr().err == ""
