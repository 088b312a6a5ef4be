"""The command line: `dream4d COMMAND ...`, made from the recipes' dataclasses."""

from __future__ import annotations

import os
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C."""
    # Threads that wait must sleep, not spin: on a busy machine a spinning one takes the core that it waits for
    # (measured: half the time a step). OpenMP reads this when torch is imported, so it has to be here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from .entry import run

    return run(argv)
