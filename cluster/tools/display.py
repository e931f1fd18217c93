"""Progress for people while a cluster starts and reads, on stderr: bars on a terminal, a line every few seconds
elsewhere. And what tables and durations look like."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table

from cluster.common.text_format import escape_unprintable
from cluster.common.units import format_bytes
from cluster.engine.outputs import OutputToken, PrefillProgress
from cluster.engine.request_handle import EngineEvent
from cluster.stages.launcher import LaunchStatus

_LINE_EVERY_S = 5.0  # between progress lines when stderr is no terminal


class Display:
    """Progress of starting, reading and answering; silent with `quiet`. Used as a context manager."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._live = console.is_terminal and not quiet
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=32),
            TextColumn("{task.fields[figures]}", markup=False), console=console, transient=True,
            disable=not self._live,
        )  # fmt: skip
        self._label = self._phase = ""
        self._last_line = 0.0

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def clear(self) -> None:
        """Remove the bar before the end; may be called twice."""
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        if not self._quiet:
            self._console.print(escape_unprintable(text), highlight=False, soft_wrap=True, markup=False)

    def label(self, text: str) -> None:
        """Show `text` before the names of the following phases; empty for none."""
        self._label = escape_unprintable(text)

    def status(self, phase: str) -> None:
        """Show a phase without figures."""
        self._show(phase)

    def launch(self, status: LaunchStatus) -> None:
        """Show a step of starting."""
        loaded, total = status.loaded_bytes, status.total_bytes
        self._show(status.phase, f"{format_bytes(loaded)} of {format_bytes(total)}" if total else "", loaded, total)

    def reading(self, num_questions: int) -> Callable[[int, EngineEvent], None]:
        """Return a callback for `ClusterRuntime.submit`: the first prompt's prefill, then tokens of all answers."""
        written = 0

        def on_event(index: int, event: EngineEvent) -> None:
            nonlocal written
            if isinstance(event, PrefillProgress) and index == 0 and not written:
                self.tokens("reading", event.processed, event.total, event.eta_ms)
            elif isinstance(event, OutputToken):
                written += 1
                what = "answering" if num_questions == 1 else f"answering {num_questions} questions"
                self._show(what, f"{written} tokens")

        return on_event

    def tokens(self, phase: str, done: int, total: int, eta_ms: int | None = None) -> None:
        """Show how many tokens of a phase are done."""
        left = "" if eta_ms is None else f", {format_duration(eta_ms / 1000)} left"
        self._show(phase, f"{done:,} of {total:,} tokens{left}", done, total)

    def amount(self, phase: str, done: int, total: int) -> None:
        """Show how many bytes of a phase are done; without a total, how many files."""
        if total:
            self._show(phase, f"{format_bytes(done)} of {format_bytes(total)}", done, total)
        else:
            self._show(phase, f"{done:,}" if done else "")

    def count(self, phase: str, done: int, total: int) -> None:
        """Show how many things of a phase are done."""
        self._show(phase, f"{done:,} of {total:,}", done, total)

    def _show(self, phase: str, figures: str = "", done: int = 0, total: int = 0) -> None:
        if self._quiet:
            return
        phase = escape_unprintable(phase)
        phase = f"{self._label}: {phase}" if self._label else phase
        is_new, self._phase = phase != self._phase, phase
        if not self._live:
            now = time.monotonic()
            if is_new or now - self._last_line >= _LINE_EVERY_S:
                self._console.print(f"{phase}: {figures}" if figures else phase, highlight=False, markup=False)
                self._last_line = now
            return
        if is_new:
            for task in self._progress.task_ids:
                self._progress.remove_task(task)
            self._progress.add_task(phase, total=total or None, figures=figures)
        self._progress.update(self._progress.task_ids[0], completed=done, total=total or None, figures=figures)


def in_table(text: str) -> str:
    """Return text from outside as a cell or line that rich prints as it is, on one line."""
    return escape(escape_unprintable(text))


def plain_table(*columns: str) -> Table:
    """Return a table of aligned columns without a frame."""
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def format_duration(seconds: float) -> str:
    """Return a time as people write it: `0.4 s`, `12 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
