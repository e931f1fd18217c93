"""Progress for people while a cluster starts and reads, on stderr: bars on a terminal, a line every few seconds
elsewhere. And what tables and durations look like."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from cluster.common.units import format_bytes
from cluster.engine.outputs import Generation, OutputToken, PrefillProgress
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
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=32),
            TextColumn("{task.fields[figures]}"), console=console, transient=True, disable=not self._live,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._label = ""
        self._phase = ""
        self._last_line = 0.0
        self._answered: dict[int, int] = {}

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
            self._console.print(text, highlight=False, soft_wrap=True)

    def label(self, text: str) -> None:
        """Show `text` before the names of the following phases; empty for none."""
        self._label = text

    def status(self, phase: str) -> None:
        """Show a phase without figures."""
        self._show(phase, 0, None, "", None)

    def launch(self, status: LaunchStatus) -> None:
        """Show a step of starting."""
        figures = ""
        if status.total_bytes:
            figures = f"{format_bytes(status.loaded_bytes)} of {format_bytes(status.total_bytes)}"
        self._show(status.phase, status.loaded_bytes, status.total_bytes or None, figures, None)

    def reading(self, num_questions: int) -> Callable[[int, EngineEvent], None]:
        """Return a callback for `ClusterRuntime.submit`: the first prompt's prefill, then tokens of all answers."""
        self._answered = {}

        def on_event(index: int, event: EngineEvent) -> None:
            if isinstance(event, PrefillProgress) and index == 0 and not self._answered:
                self.prefill(event.processed, event.total, event.eta_ms)
            elif isinstance(event, OutputToken):
                self._answered[index] = self._answered.get(index, 0) + 1
                written = sum(self._answered.values())
                what = "answering" if num_questions == 1 else f"answering {num_questions} questions"
                self._show(what, 0, None, f"{written} tokens", None)
            elif isinstance(event, Generation):
                self._progress.refresh()

        return on_event

    def prefill(self, processed: int, total: int, eta_ms: int | None) -> None:
        """Show how much of a prompt (tokens) is read."""
        self._show("reading", processed, total, f"{processed:,} of {total:,} tokens", eta_ms)

    def tokens(self, phase: str, done: int, total: int) -> None:
        """Show how many tokens of a phase are done."""
        self._show(phase, done, total, f"{done:,} of {total:,} tokens", None)

    def _show(self, phase: str, done: int, total: int | None, figures: str, eta_ms: int | None) -> None:
        if self._quiet:
            return
        phase = f"{self._label}: {phase}" if self._label else phase
        figures += "" if eta_ms is None else f", {format_duration(eta_ms / 1000)} left"
        is_new, self._phase = phase != self._phase, phase
        if not self._live:
            now = time.monotonic()
            if is_new or now - self._last_line >= _LINE_EVERY_S:
                self._console.print(f"{phase}: {figures}" if figures else phase, highlight=False)
                self._last_line = now
            return
        if self._task is None or is_new:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(phase, total=total, figures=figures)
        self._progress.update(self._task, completed=done, total=total, figures=figures)


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
