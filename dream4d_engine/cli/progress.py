"""What people see while they wait: a bar for each stage on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from ..documents import printable
from .terminal import say

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 5.0
PATIENCE = 3.0
"""Seconds that something short may take without a sign of it."""


class Progress(AbstractContextManager, Protocol):
    """Where the stages of a run show how far they are; to be used as a context."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage of so many steps begins."""
        ...

    def update(
        self, stage: str, step: int, loss: float | None = None, remaining: float | None = None, warning: str = ""
    ) -> None:
        """A stage has `step` steps behind it; `remaining` seconds are an estimate; a `warning` goes with them."""
        ...

    def end(self, stage: str) -> None:
        """A stage is to be shown no longer."""
        ...

    def say(self, text: str) -> None:
        """A line for people."""
        ...


def clock_text(seconds: float | None) -> str:
    """Seconds as people read them: "8 s", "2:05", "1:02:03"; "" where nothing is known."""
    if seconds is None or seconds != seconds:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = divmod(whole, 60)[0], whole // 3600
    return f"{hours}:{minutes % 60:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Lines:
    """Plain lines, for pipes and log files."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._steps: dict[str, int] = {}  # of each stage, in all
        self._latest: dict[str, float] = {}  # when each stage wrote its last line
        self._done: set[str] = set()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error) -> None:
        return None

    def begin(self, stage: str, steps: int) -> None:
        self._steps[stage] = steps

    def update(
        self, stage: str, step: int, loss: float | None = None, remaining: float | None = None, warning: str = ""
    ) -> None:
        steps, now = self._steps[stage], self._clock()
        if stage in self._done:  # its last step says so, and then the stage
            return
        if step >= steps:
            self._done.add(stage)
        if step < steps and now - self._latest.get(stage, -SECONDS_BETWEEN_LINES) < SECONDS_BETWEEN_LINES:
            return
        self._latest[stage] = now
        parts = [f"{stage}: step {step}/{steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.4g}")
        if remaining is not None and step < steps:
            parts.append(f"{clock_text(remaining)} left")
        if warning:
            parts.append(warning)
        self._write(", ".join(parts))

    def end(self, stage: str) -> None:
        pass

    def say(self, text: str) -> None:
        self._write(text)


class Bars:
    """A bar for each stage, on a terminal."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Bars:
        self._bars.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._bars.__exit__(*error)

    def begin(self, stage: str, steps: int) -> None:
        from rich.markup import escape

        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(escape(stage), total=steps, loss="", left="")

    def update(
        self, stage: str, step: int, loss: float | None = None, remaining: float | None = None, warning: str = ""
    ) -> None:
        total = next(task.total or 0 for task in self._bars.tasks if task.id == self._tasks[stage])
        left = f"{clock_text(remaining)} left" if remaining is not None and step < total else ""
        left = " ".join(part for part in (left, warning) if part)
        self._bars.update(
            self._tasks[stage], completed=step, loss="" if loss is None else f"loss {loss:.4g}", left=left
        )

    def end(self, stage: str) -> None:
        if stage in self._tasks:
            self._bars.remove_task(self._tasks.pop(stage))

    def say(self, text: str) -> None:
        self._bars.console.print(printable(text), markup=False, highlight=False)  # "[red]" in a prompt is no color


class Quiet:
    """Says nothing: for the processes beside the one that speaks."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *error) -> None:
        return None

    def begin(self, stage: str, steps: int) -> None:
        pass

    def update(
        self, stage: str, step: int, loss: float | None = None, remaining: float | None = None, warning: str = ""
    ) -> None:
        pass

    def end(self, stage: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def patient(progress: Progress, stage: str) -> Callable[[float], None]:
    """Return what may be told the share done of something short: a stage of its own, if it takes longer after all."""
    began = time.monotonic()

    def on_progress(share: float) -> None:
        if time.monotonic() - began > PATIENCE:
            progress.begin(stage, 100)
            progress.update(stage, round(100 * share))

    return on_progress


def make_progress() -> Progress:
    """Bars where standard output is a terminal, else lines."""
    if not sys.stdout.isatty():  # a pipe or a log would be filled with every redrawing of the bars
        return Lines(say)
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return Bars(
        RichProgress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]:<14}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
    )
