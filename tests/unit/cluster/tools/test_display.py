"""Progress as lines where there is no terminal, as a bar where there is one; durations; plain tables."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.stages.launcher import LaunchStatus
from cluster.tools import display
from cluster.tools.display import Display, format_duration, in_table, plain_table

EVIL = "a\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\u200b\nforged [bold]"
DANGER = ("\x1b]", "\x07", "\x1b[31m", "\x9b", "\u202e", "\u200b")


def shown(terminal: bool = False, quiet: bool = False) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, force_terminal=terminal, width=100), quiet), out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"), (0.44, "0.4 s"), (9.96, "10.0 s"), (10.0, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"),
        (200.0, "3 min 20 s"), (3599.6, "1 h 0 min"), (3900.0, "1 h 5 min"),
    ],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_lines_come_at_a_new_phase_and_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    progress, out = shown()
    with progress:
        progress.launch(LaunchStatus("starting Ray"))
        progress.launch(LaunchStatus("loading weights", 1 << 20, 1 << 30))
        progress.launch(LaunchStatus("loading weights", 2 << 20, 1 << 30))
        now[0] += 5.0
        progress.launch(LaunchStatus("loading weights", 3 << 20, 1 << 30))
        progress.label("yarn 4K")
        progress.tokens("reading", 1000, 4096, 2500)
        progress.say("done")
    assert out.getvalue().splitlines() == [
        "starting Ray", "loading weights: 1MiB of 1GiB", "loading weights: 3MiB of 1GiB",
        "yarn 4K: reading: 1,000 of 4,096 tokens, 2.5 s left", "done",
    ]  # fmt: skip


def test_reading_follows_the_first_prompt_then_counts_tokens() -> None:
    progress, out = shown()
    on_event = progress.reading(2)
    on_event(1, PrefillProgress(100, 0, 50, None))
    on_event(0, PrefillProgress(100, 0, 50, None))
    on_event(1, OutputToken(1, 1, 0, "a"))
    on_event(0, PrefillProgress(100, 0, 100, None))
    assert out.getvalue().splitlines() == ["reading: 50 of 100 tokens", "answering 2 questions: 1 tokens"]


def test_quiet_says_nothing() -> None:
    progress, out = shown(quiet=True)
    with progress:
        progress.say("a")
        progress.tokens("phase", 1, 2)
        progress.status("b")
        progress.clear()
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away() -> None:
    progress, out = shown(terminal=True)
    with progress:
        progress.tokens("comparing", 1, 2)
        progress.tokens("comparing", 2, 2)
        progress.status("next")
        progress.clear()
        progress.clear()
    assert "comparing" in out.getvalue() or "next" in out.getvalue()
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


def test_plain_tables_are_aligned_and_have_no_colours_in_a_pipe() -> None:
    out = io.StringIO()
    table = plain_table("id", "n")
    table.add_row("a", "1")
    table.add_row("long", "22")
    Console(file=out, width=40).print(table)
    assert [line.rstrip() for line in out.getvalue().splitlines()] == ["id    n", "a     1", "long  22"]


@pytest.mark.parametrize("terminal", [True, False])
def test_texts_from_outside_stay_text(terminal: bool) -> None:
    progress, out = shown(terminal)
    with progress:
        progress.say(EVIL)
        progress.label(EVIL)
        progress.status(EVIL)
        progress.tokens(EVIL, 1, 2)
    text = out.getvalue()
    assert [sign for sign in DANGER if sign in text] == []
    assert "\nforged" not in text
    assert "[bold]" in text
    assert in_table(EVIL) == r"a\x1b]0;owned\x07\x1b[31m\x9b2J\u202e\u200b\nforged \[bold]"
