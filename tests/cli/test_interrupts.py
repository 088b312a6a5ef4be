"""Signals that ask a run to stop."""

from __future__ import annotations

import signal
import time

from dream4d_engine.cli import interrupts
from dream4d_engine.cli.interrupts import stop_on_interrupt


def test_a_ctrl_c_that_torchrun_passes_on_is_the_same_one(monkeypatch, capsys):
    """A terminal sends it to all processes, torchrun to its own once more: that is no second wish, which kills."""
    killed, now = [], time.monotonic()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now)
    with stop_on_interrupt(before_kill=lambda: killed.append(1)) as should_stop:
        monkeypatch.setattr(interrupts.signal, "raise_signal", lambda number: killed.append(number))
        signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        assert should_stop() and should_stop.code == 130
        now += interrupts.PASSED_ON / 2
        signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        assert not killed
        now += interrupts.PASSED_ON
        signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        assert killed == [1, signal.SIGINT]
    assert capsys.readouterr().err.count("Ctrl-C again kills") == 1


def test_without_torchrun_the_second_ctrl_c_kills_at_once(monkeypatch):
    """Even a process that hangs in a library, where no function of ours is called."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with stop_on_interrupt() as should_stop:
        signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        assert should_stop() and signal.getsignal(signal.SIGINT) is signal.SIG_DFL
