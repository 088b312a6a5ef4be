"""The command line: `dream4d COMMAND ...`, made from the recipes' dataclasses."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .errors import ERROR, report
from .interrupts import INTERRUPTED
from .terminal import prepare, quieten, say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (None: the process's own words) names.

    Returns the exit code: 0 done, 1 a scene of a batch isn't, 2 a mistake in what was asked for, 130 stopped by Ctrl-C.
    """
    # Threads that wait must sleep, not spin: on a busy machine a spinning one takes the core that it waits for
    # (measured: half the time a step). OpenMP reads this when torch is imported, so it has to be here.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    words = list(sys.argv[1:] if argv is None else argv)
    prepare()
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            from .command import help_text

            say(*help_text().splitlines())
            return 0
        if words[0] in ("--version", "version"):
            from .. import __version__

            say(f"dream4d {__version__}")
            return 0
        quieten(may_download="--download" in words)  # before anything imports the libraries
        from .options import use_machine
        from .parsing import parse_line

        command, call = parse_line(words)
        use_machine(call.options.machine)
        return command.run(**vars(call))  # called from here, so that a traceback is short
    except SystemExit as end:  # --help, or there was nothing to do
        return int(end.code or 0)
    except KeyboardInterrupt:
        say("stopped", error=True)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ERROR
    except Exception as error:
        return report(error, show_traceback="--debug" in words)
