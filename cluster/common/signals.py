"""Calls that signals do not disturb: native code that installs handlers of its own, and must not be left by an
exception that a handler of ours raises.

While the main thread waits for signals, the kernel gives it all those of the process, whatever other threads do.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_LOOK_EVERY_S = 0.5
STOP_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM})
_WAKE = signal.SIGURG  # ends the wait; ignored where it is not waited for


def call_undisturbed(call: Callable[[], object], on_signal: Callable[[int], object]) -> None:
    """Run `call` on a thread of its own; meanwhile the main thread, which calls this, takes SIGINT and SIGTERM.

    Threads and programs that `call` starts have both blocked. Handlers of both are as they were afterwards. Raises what
    `call` raises.

    Args:
        on_signal: called with the number of each signal; its exceptions would leave `call` alone.
    """
    main, ended, errors = threading.get_ident(), threading.Event(), []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            errors.append(error)
        finally:
            ended.set()
            signal.pthread_kill(main, _WAKE)

    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS | {_WAKE})
    try:
        for each in STOP_SIGNALS:  # for one that meets another thread while the main thread does not wait
            signal.signal(each, lambda number, _: on_signal(number))
        thread = threading.Thread(target=run, name="undisturbed", daemon=True)
        thread.start()
        while not ended.is_set():
            if number := _next_signal():
                on_signal(number)
        thread.join()
        while pending := signal.sigpending() & (STOP_SIGNALS | {_WAKE}):
            if (number := signal.sigwait(pending)) != _WAKE:
                on_signal(number)
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # else it was not made by Python
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if errors:
        raise errors[0]


def _next_signal() -> int:
    """Wait for a signal and return its number, or 0 for none, after a while in which handlers run."""
    if sys.platform == "darwin":  # it has no time-out there
        number = signal.sigwait(STOP_SIGNALS | {_WAKE})
    else:
        found = signal.sigtimedwait(STOP_SIGNALS | {_WAKE}, _LOOK_EVERY_S)
        number = found.si_signo if found is not None else 0
    return 0 if number == _WAKE else int(number)


def call_native(call: Callable[[], object]) -> None:
    """Run `call`; signals that arrive meanwhile are handled after it. Raises what `call` or a handler raises."""
    if threading.current_thread() is not threading.main_thread():
        call()  # no handler runs here
        return
    arrived: list[int] = []
    try:
        call_undisturbed(call, arrived.append)
    finally:
        for number in arrived:
            signal.raise_signal(number)
