"""The verbs that start and stop a head: serve, up, down."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from cluster.cli.common import (
    EXIT_CLUSTER,
    EXIT_INPUT,
    EXIT_INTERRUPTED,
    fail,
    one_line_errors,
    open_display,
    say,
    say_json,
    warn,
)

if TYPE_CHECKING:
    import psutil

    from cluster.config.deployment import Config
    from cluster.server.state_files import HeadFiles
    from cluster.stages.launcher import LaunchStatus

_INTERRUPT_GRACE_S = 60.0  # for a starting head to take its processes down
_REAP_S = 3.0  # for the parent of a head that has ended to take note, where it does; some look every second or two
_CLEANUP_S = 10.0  # for the processes of a head that was killed


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--notify-fd", type=int, hidden=True, help="Where to report progress, one JSON object a line.")
def serve(config: Path, notify_fd: int | None) -> None:
    """Run the head of CONFIG in the foreground until SIGTERM or Ctrl-C, then let running jobs finish."""
    with one_line_errors():
        from cluster.common.logs import configure_logging
        from cluster.server.head import run_head
        from cluster.server.state_files import HeadFiles, HeadRunning
        from cluster.stages.socket_dirs import clean_run_dirs

        configure_logging()
        clean_run_dirs()
        loaded = _load(config, needs_port=True)
        files = HeadFiles(loaded.data_dir)
        try:
            files.claim()
        except HeadRunning as error:
            fail(f"{error}; stop it with: longreach down {config}", EXIT_CLUSTER)
        display = open_display(False)
        report = _reporter(notify_fd)
        try:
            with display:

                def on_status(status: LaunchStatus) -> None:
                    display.launch(status)
                    report(phase=status.phase, loaded_bytes=status.loaded_bytes, total_bytes=status.total_bytes)

                def on_ready(address: str, http_url: str) -> None:
                    files.announce(address, loaded.security, http_url)
                    display.clear()
                    display.say(f"head ready at {address}{_over_http(http_url)}")
                    report(address=address)

                def on_warning(line: str) -> None:
                    report(warning=line)  # it is in the log already

                code = run_head(config, on_status, on_ready, on_warning)
        finally:
            files.release()
    sys.exit(code)


def _load(config: Path, needs_port: bool = False) -> Config:
    """Return a configuration; with `needs_port`, port 0 raises UserError."""
    from cluster.config.deployment import load_config
    from protos.errors import UserError

    loaded = load_config(config)
    if needs_port and not loaded.server.port:
        raise UserError(f"{config}: server.port: 0: a head without a port hears no one; must be such as 7777")
    return loaded


def _reporter(descriptor: int | None) -> Callable[..., None]:
    """Return a function that reports to `up`, one JSON object a line, if it started this head and still reads."""
    if descriptor is None:
        return lambda **values: None
    os.set_inheritable(descriptor, False)  # `up` must see the end when this process ends, not its children

    def report(**values: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # `up` was killed; the head goes on
            os.write(descriptor, json.dumps(values).encode() + b"\n")

    return report


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def up(config: Path, as_json: bool) -> None:
    """Start the head of CONFIG in the background and wait until it is ready.

    Its log is log/head.log under the data directory. A head that already runs is left alone.
    """
    import psutil

    from cluster.client.connection import read_state
    from cluster.client.errors import Unavailable
    from cluster.server.security import certificate_warnings
    from cluster.server.state_files import HeadFiles

    with one_line_errors():
        loaded = _load(config, needs_port=True)
        files = HeadFiles(loaded.data_dir)
        if other := files.running():
            try:
                _print_state(files, read_state(files.data_dir), "already running", as_json)
            except Unavailable:
                fail(f"a head is starting already (pid {other.pid}), see {files.log}", EXIT_CLUSTER)
            return
        for line in certificate_warnings(loaded.security):
            warn(line)
        before = files.log.stat().st_size if files.log.exists() else 0
        child, progress = _spawn(files, config)
        try:
            with open_display(as_json) as display, progress:
                ready = _follow(progress, display)
        except KeyboardInterrupt:
            click.echo("longreach: interrupted; stopping the head", err=True)
            _stop(psutil.Process(child.pid), _INTERRUPT_GRACE_S)
            sys.exit(EXIT_INTERRUPTED)
        if not ready:
            _give_up(child, files, before)
        _print_state(files, read_state(files.data_dir), "ready", as_json)


def _spawn(files: HeadFiles, config: Path) -> tuple[subprocess.Popen[bytes], TextIO]:
    """Start `serve` in its own session; return the process and the reading end of its progress."""
    from cluster.common.errors import PreflightError

    try:
        files.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = files.log.open("ab")
    except OSError as error:
        problem = f"cannot be written ({error.strerror}): remove what is in the way"
        raise PreflightError(f"data_dir: {error.filename or files.log}: {problem}") from error
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "cluster.cli", "serve", str(config.absolute()), "--notify-fd", str(writing)]
    with log:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, pass_fds=[writing]
        )
    os.close(writing)
    return child, os.fdopen(reading)


def _follow(progress: TextIO, display: Any) -> bool:
    """Show the progress of the head until it is ready; return false when it ended before."""
    from cluster.stages.launcher import LaunchStatus

    for line in progress:
        report = json.loads(line)
        if "address" in report:
            return True
        if "warning" in report:
            display.clear()
            click.echo(f"longreach: warning: {report['warning']}", err=True)
            continue
        display.launch(LaunchStatus(**report))
    return False


def _give_up(child: subprocess.Popen[bytes], files: HeadFiles, log_start: int) -> None:
    """Exit with the reason why the head ended, and its exit code; its log begins at byte `log_start`."""
    code = child.wait()
    lines = files.log.read_bytes()[log_start:].decode(errors="replace").splitlines()
    reasons = [line for line in lines if line.startswith("longreach: error: ")]
    reason = reasons[-1].removeprefix("longreach: error: ") if reasons else f"the head ended with code {code}"
    fail(f"{reason} (log: {files.log})", code if code in (EXIT_INPUT, EXIT_INTERRUPTED) else EXIT_CLUSTER)


def _print_state(files: HeadFiles, state: dict[str, Any], what: str, as_json: bool) -> None:
    if as_json:
        say_json(state | {"log": str(files.log)})
    else:
        say(f"{what} at {state['address']}{_over_http(state['http_url'])} (pid {state['pid']}), log {files.log}")


def _over_http(url: str) -> str:
    return f", HTTP at {url}" if url else ""


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--data-dir", type=click.Path(path_type=Path), help="Data directory of the head, instead of CONFIG.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), default=60.0, show_default=True, metavar="SECONDS",
    help="How long running jobs may take before the head is killed; they go on with the next head.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def down(config: Path | None, data_dir: Path | None, timeout: float, as_json: bool) -> None:
    """Stop the head of CONFIG or of a data directory; fine when none runs."""
    from cluster.client.connection import DEFAULT_DATA_DIR, last_failure
    from cluster.common.text_format import escape_unprintable
    from cluster.server.state_files import HeadFiles
    from cluster.stages.socket_dirs import clean_run_dirs

    with one_line_errors():
        if config is not None and data_dir is not None:
            fail("CONFIG, --data-dir: give one of them", EXIT_INPUT)
        default = (data_dir or Path(DEFAULT_DATA_DIR)).expanduser()
        files = HeadFiles(default if config is None else _load(config).data_dir)
        process = files.running()
        outcome = _stop(process, timeout) if process is not None else "no head is running"
        if files.remove_stale() and process is None:
            outcome = "removed the files of a head that no longer runs"
        if process is None and (reason := last_failure(files.data_dir)):
            outcome += f"; the last one ended: {escape_unprintable(reason)}"
        clean_run_dirs()
        if as_json:
            say_json({"pid": process.pid if process else None, "outcome": outcome})
        else:
            click.echo(outcome)


def _stop(process: psutil.Process, timeout_s: float) -> str:
    """Stop a head by SIGTERM, or after `timeout_s` by SIGKILL with all it has started; return what happened."""
    import psutil

    everything = [process]
    try:
        everything += process.children(recursive=True)
        os.kill(process.pid, signal.SIGTERM)
    except (ProcessLookupError, psutil.NoSuchProcess):
        pass
    except (PermissionError, psutil.AccessDenied):
        fail(f"pid {process.pid}: belongs to another user; stop it as that user", EXIT_CLUSTER)
    if not _wait_ended([process], timeout_s):
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(_REAP_S)
        return f"stopped (pid {process.pid})"
    _kill([process])
    _kill(_wait_ended(everything, _CLEANUP_S))  # usually nobody: what owns Ray ends the rest
    _wait_ended(everything, _CLEANUP_S)
    return f"killed (pid {process.pid}): it had not stopped after {timeout_s:g} s"


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def _wait_ended(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until processes have ended; returns those that run on after `timeout_s`.

    One that nobody reaps, as in a container without an init, has ended too.
    """
    end = time.monotonic() + timeout_s
    while True:
        processes = [process for process in processes if _runs(process)]
        if not processes or time.monotonic() >= end:
            return processes
        time.sleep(0.02)


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


VERBS: tuple[click.Command, ...] = (serve, up, down)
