"""What is known of the steps that were taken: read a step late on a GPU, so that nobody waits for it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from ..guidance.distillation import NONFINITE
from ..supervision import Terms
from ..transfers import Fetched, fetch
from .control import PriorSilent, StepReport, TrainingDiverged

MOST_NONFINITE = 0.01
"""A step changes nothing where more of a prior's answer is not finite."""
MOST_SILENT_STEPS = 5
"""So many such steps in a row a run bears."""


def all_answered(terms: Terms, device: torch.device) -> Tensor:
    """Whether all priors gave an answer: [] bool, on the device."""
    shares = [value for name, value in terms.notes.items() if _silent_prior(name)]
    if not shares:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack([share.detach().float() for share in shares]).max() <= MOST_NONFINITE


def _silent_prior(note: str) -> str | None:
    """The prior whose share of values that are not finite a note is, or None."""
    prior, _, name = note.rpartition(".")  # "multiview.nonfinite", see supervision/distil.py
    return prior if name == NONFINITE else None


@dataclass(frozen=True)
class Found:
    """What a step found, on its way from the device."""

    values: Fetched  # loss, 1 where the parameters were changed, then the terms
    names: tuple[str, ...]  # of the terms

    def read(self) -> tuple[float, bool, dict[str, float]]:
        """(loss, whether the parameters were changed, terms); waits for the step if it has to."""
        loss, changed, *terms = self.values.read()
        return loss, bool(changed), dict(zip(self.names, terms, strict=True))


def found(loss: Tensor, changed: Tensor, terms: Terms) -> Found:
    """Gather what a step found; on a GPU its way to the CPU is only begun here."""
    named = terms.losses | terms.notes
    # reports on a CPU show the losses' own digits, whatever their type
    dtype = torch.float32 if loss.device.type == "cuda" else torch.float64
    scalars = [s.detach().to(dtype) for s in (loss, changed, *named.values())]
    return Found(fetch(torch.stack(scalars)), tuple(named))  # one transfer for all


class History:
    """The steps so far; the latest `lag` of them are not read yet."""

    def __init__(self, stage: str, max_bad_steps: int, lag: int) -> None:
        self.stage, self.max_bad_steps, self.lag = stage, max_bad_steps, lag
        self.loss, self.bad_steps = float("nan"), 0
        self.terms: dict[str, float] = {}
        self._waiting: deque[tuple[int, Found]] = deque()
        self._n_steps = self._bad_run = self._silent_run = 0
        self._nonfinite: dict[str, float] = {}  # sums over the steps

    @property
    def nonfinite(self) -> dict[str, float]:
        """By prior: the share of all its answers that was not finite, where it isn't 0."""
        return {prior: total / self._n_steps for prior, total in self._nonfinite.items() if total}

    @property
    def silent(self) -> bool:
        """Whether a prior gave no answer in the latest step that was read."""
        return self._silent_run > 0

    def report(self, done: int, steps: int, pace: float) -> StepReport:
        """What is known after so many steps."""
        left = pace * (steps - done)
        return StepReport(self.stage, done, steps, self.loss, self.terms, pace, left, self.bad_steps, self.nonfinite)

    def add(self, step: int, found: Found) -> None:
        """A step was taken: read those that are old enough. Raises PriorSilent or TrainingDiverged after too many bad
        ones in a row."""
        self._waiting.append((step, found))
        while len(self._waiting) > self.lag:
            self._read(*self._waiting.popleft())

    def finish(self, one_must_be_good: bool) -> None:
        """Read all that is left; raise where no step at all has changed anything, if one should have."""
        while self._waiting:
            self._read(*self._waiting.popleft())
        if one_must_be_good and self._silent_run == self._n_steps:
            raise self._silent(self._n_steps - 1)
        if one_must_be_good and self.bad_steps == self._n_steps:
            raise self._diverged(self._n_steps - 1)

    def _read(self, step: int, found: Found) -> None:
        self.loss, changed, self.terms = found.read()
        self._n_steps += 1
        shares = self._shares()
        for prior, share in shares.items():
            self._nonfinite[prior] = self._nonfinite.get(prior, 0.0) + share
        silent = any(share > MOST_NONFINITE for share in shares.values())
        self._silent_run = self._silent_run + 1 if silent else 0
        self.bad_steps, self._bad_run = self.bad_steps + (not changed), 0 if changed else self._bad_run + 1
        if self._silent_run > MOST_SILENT_STEPS:  # first: a silent prior's steps are bad ones, too
            raise self._silent(step)
        if self._bad_run > self.max_bad_steps:
            raise self._diverged(step)

    def _shares(self) -> dict[str, float]:
        return {prior: share for name, share in self.terms.items() if (prior := _silent_prior(name)) is not None}

    def _silent(self, step: int) -> PriorSilent:
        shares = self._shares()
        prior = max(shares, key=lambda name: shares[name])
        return PriorSilent(
            f"{self.stage}: {shares[prior]:.0%} of what the {prior} prior answers is not finite, {self._silent_run} "
            f"steps in a row, up to step {step + 1}",
            prior,
        )

    def _diverged(self, step: int) -> TrainingDiverged:
        return TrainingDiverged(
            f"{self.stage}: {self._bad_run} steps in a row gave no finite gradient (step {step}, "
            f"loss {self.loss}): lower the learning rates or the guidance scale"
        )
