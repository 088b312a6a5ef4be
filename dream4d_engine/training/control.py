"""How a run talks to the outside: what it may take, what it reports after a step, and the ways it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..scene import Scene
from .processes import SINGLE, Processes, Share


class Interrupted(RuntimeError):
    """A run that was asked to stop, after `step` steps; its state is in `checkpoint` if it has one."""

    def __init__(self, stage: str, step: int, checkpoint: Path | None) -> None:
        where = f"saved in {checkpoint}" if checkpoint else "not saved"
        super().__init__(f"{stage} stopped after step {step}, {where}")
        self.stage, self.step, self.checkpoint = stage, step, checkpoint


class TrainingDiverged(RuntimeError):
    """Too many steps in a row gave no finite gradient."""


class PriorSilent(TrainingDiverged):
    """A prior has given no finite answer for too many steps in a row; `prior`: its kind."""

    def __init__(self, text: str, prior: str) -> None:
        super().__init__(text)
        self.prior = prior


class ResumeMismatch(ValueError):
    """An unfinished run was started with other settings than the present ones."""


@dataclass(frozen=True)
class StepReport:
    """What is known after a step. On a GPU the numbers marked * are those of the step before, which is done by now."""

    stage: str
    step: int  # steps done
    steps: int  # of the whole run
    loss: float  # *; NaN after a GPU's first step
    terms: dict[str, float]  # *: the loss's parts, and what else the supervisions noted
    seconds_per_step: float  # wall-clock
    remaining: float  # seconds, estimated from the latest steps
    bad_steps: int  # * that changed nothing, since their gradient was not finite
    nonfinite: dict[str, float] = field(default_factory=dict)  # by prior: share of its answers so far, where not 0

    @property
    def warning(self) -> str:
        """The shares that were not finite, for people; "" where there are none."""
        return ", ".join(f"{prior} prior: {100 * x:.2g} % not finite" for prior, x in sorted(self.nonfinite.items()))


@dataclass(frozen=True)
class FitSummary:
    """What a run did."""

    steps: int
    seconds: float
    seconds_per_step: float  # median of the steps taken now, not those before a resume
    bad_steps: int  # see StepReport
    resumed_from: int  # step
    final_loss: float  # NaN where no step was taken
    nonfinite: dict[str, float] = field(default_factory=dict)  # see StepReport


@dataclass(frozen=True)
class RunControl:
    """What a run is told beside what to train. Only the first of several processes writes and calls `on_step`."""

    checkpoint: Path | None = None  # file for the unfinished state, gone on from if it is there; None: not saved
    identity: dict = field(default_factory=dict)  # JSON tree that must equal the checkpoint's, else ResumeMismatch
    on_step: Callable[[StepReport, Scene], None] | None = None  # after every step; the scene is not to be changed
    should_stop: Callable[[], bool] | None = None  # asked after every step
    clock: Callable[[], float] = time.monotonic  # seconds
    processes: Processes = SINGLE  # that train together
    share: Share = "cameras"  # what they share
    memory_budget: int | None = None  # bytes of GPU memory that this process may take; None: all
    memory_beside: int = 0  # bytes of them that somebody takes beside PyTorch's allocator
    on_plan: Callable[[str], None] | None = None  # is told how the budget is kept, and what processes share

    def stop_if_asked(self, stage: str) -> None:
        """Raise Interrupted where a run is asked to stop before its first step."""
        # of several processes none does: the others would wait for it; they stop together, after the first step
        if self.processes.world_size == 1 and self.should_stop is not None and self.should_stop():
            raise Interrupted(stage, 0, None)
