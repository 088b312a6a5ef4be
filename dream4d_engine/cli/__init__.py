"""The command line: `dream4d COMMAND ...`, made from the recipes' dataclasses."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 2 a mistake in what was asked for, 130 stopped by Ctrl-C."""
    from .entry import run

    return run(argv)
