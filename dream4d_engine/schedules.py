"""Numbers that change with the progress of a run.

Progress is the share of the steps already taken, in [0, 1). The published schedules count steps; written as
shares of the run they keep their shape when a user asks for fewer steps.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A value that is `first` until progress `start`, linear to `last` at progress `end`, then `last`."""

    first: float  # up to `start`, a share of the run
    last: float  # from `end` on, linear in between
    start: float = 0.0  # share of the run
    end: float = 1.0  # share of the run

    def __post_init__(self) -> None:
        if not 0.0 <= self.start <= self.end <= 1.0:
            raise ValueError(f"a schedule needs 0 <= start <= end <= 1, got start={self.start}, end={self.end}")

    def __call__(self, progress: float) -> float:
        if progress >= self.end:
            return self.last
        if progress <= self.start:
            return self.first
        share = (progress - self.start) / (self.end - self.start)
        return self.first + share * (self.last - self.first)


def constant(value: float) -> Schedule:
    """The schedule that never changes."""
    return Schedule(value, value)


def stepped(progress: float, first: int, per_run: float) -> int:
    """Return `first` plus one for each of `per_run` equal parts of the run already passed.

    The coarse-to-fine rule "4 + step // 500" of a 10,000-step run is `stepped(progress, 4, 20)`.
    """
    return first + int(progress * per_run + 1e-6)  # 0.29 * 100 is 28.999...


def milestones(progress: float, marks: tuple[float, ...], factor: float) -> float:
    """Return `factor` to the power of the number of `marks` (progress values) already passed."""
    return factor ** sum(progress + 1e-9 >= mark for mark in marks)  # step / steps may lie just below a mark
