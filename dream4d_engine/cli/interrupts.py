"""Ctrl-C and SIGTERM: the first one asks the run to save and stop, a second Ctrl-C kills.

SIGTERM is how containers and batch systems end a process; some send it more than once. torchrun passes on a Ctrl-C that
its processes have heard already, as the terminal sends it to all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .terminal import say

INTERRUPTED = 130
"""The exit code of a run that Ctrl-C stopped; of one that another signal did: 128 and its number."""
PASSED_ON = 2.0
"""Seconds after a Ctrl-C in which a launcher may have passed it on (measured: some hundredths; machines are busy)."""


class Stopped(RuntimeError):
    """A run that was stopped; the message says how to go on, `code` is the exit code."""

    def __init__(self, text: str, code: int = INTERRUPTED) -> None:
        super().__init__(text)
        self.code = code


class StopRequest:
    """To be called: whether the process was asked to stop."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.code = INTERRUPTED  # the exit code that says so

    def __call__(self) -> bool:
        return self.asked.is_set()


@contextmanager
def stop_on_interrupt(before_kill: Callable[[], None] | None = None) -> Iterator[StopRequest]:
    """Give a function that says whether a signal asked to stop since; the old handling comes back afterwards.

    `before_kill` is called by the Ctrl-C that kills.
    """
    request, deaf_until = StopRequest(), 0.0
    launched = "TORCHELASTIC_RUN_ID" in os.environ  # by torchrun, in its own words
    if threading.current_thread() is not threading.main_thread():  # only the main one may handle signals
        yield request
        return

    def handle(number: int, _frame: object) -> None:
        nonlocal deaf_until
        if not request():  # the first signal says how the process ends
            request.code = 128 + number
            request.asked.set()
            deaf_until = time.monotonic() + PASSED_ON if launched else 0.0
        # SIGTERM goes on being heeded: batch systems send it twice
        signal.signal(signal.SIGINT, signal.SIG_DFL if before_kill is None and not launched else kill)
        with contextlib.suppress(OSError):  # nobody may be left to read it
            say("stopping after this step; Ctrl-C again kills", error=True)

    def kill(number: int, _frame: object) -> None:
        if time.monotonic() < deaf_until:  # the same one again
            return
        signal.signal(number, signal.SIG_DFL)
        if before_kill is not None:
            before_kill()
        signal.raise_signal(number)

    names = ("SIGINT", "SIGTERM", "SIGBREAK")  # the last one is Windows' way to end a console's processes
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
