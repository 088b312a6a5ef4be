"""Ctrl-C: the first one asks the run to save and stop, the second one kills."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .terminal import say

INTERRUPTED = 130
"""The exit code of a run that Ctrl-C stopped."""


class Stopped(RuntimeError):
    """A run that Ctrl-C stopped; the message says how to go on."""


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C was pressed since; the old handling comes back afterwards."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main one may handle signals
        yield pressed.is_set
        return

    def handle(_signal: int, _frame: object) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        say("stopping after this step; Ctrl-C again kills", error=True)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
