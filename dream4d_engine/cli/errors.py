"""Every expected error as one line, and the exit code that goes with it."""

from __future__ import annotations

import traceback

from .interrupts import INTERRUPTED, Stopped
from .terminal import say

ERROR = 2


class UsageError(ValueError):
    """Something on the command line that can't be understood."""


def report(error: Exception, show_traceback: bool = False) -> int:
    """Print one line about an error and return the exit code."""
    from ..division import ProcessLost
    from ..machine import lacks_memory
    from ..training.loop import Interrupted, TrainingDiverged

    if show_traceback:
        say(*traceback.format_exception(error), error=True)
    if isinstance(error, Interrupted | Stopped):
        say(str(error), error=True)
        return getattr(error, "code", INTERRUPTED)
    text = str(error)
    if lacks_memory(error):
        text = (
            "out of memory: lower the images' size (--static.phases.N.height and .width, or --motion...), "
            "the samples (--static.scene.n-samples), the grids (log2-entries), or --size for videos"
        )
    elif isinstance(error, OSError):
        # an OSError's own text begins with its number, which tells people nothing
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    elif isinstance(error, ImportError):
        text = f"{error}: install dream4d with its dependencies (pip install -e .)"
    elif not isinstance(error, ValueError | TrainingDiverged | ProcessLost):
        text = f"unexpected {type(error).__name__}: {error} (this is a defect; --debug shows where)"
    say(f"dream4d: error: {' '.join(text.split())}", error=True)
    return ERROR
