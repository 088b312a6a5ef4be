"""The training loop, in the open: one for both stages.

A step is: refresh what is known of empty space now and then, ask the objective for the loss, step the optimiser,
report, save. Everything random comes from one generator, so a run is a function of its settings.

On a GPU nothing of this waits for the GPU: what a step found is read while the next one runs, whether its gradient was
finite is decided where it is, and the next step's samples are looked for ahead of the backward pass (see lookahead.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ..guidance.distillation import NONFINITE
from ..scene import Scene
from ..schedules import milestones
from ..transfers import Fetched, fetch
from .checkpoint import (
    Checkpoint,
    check_state,
    first_difference,
    load_checkpoint,
    not_finite,
    pack_state,
    save_checkpoint,
    unpack_state,
)
from .config import LoopConfig, OptimizerConfig
from .distributed import ALONE, Team
from .lookahead import LookAhead, Views

Terms = dict[str, Tensor]

MOST_NONFINITE = 0.01
"""A step changes nothing where more of a prior's answer is not finite."""
MOST_SILENT_STEPS = 5
"""So many such steps in a row a run bears."""


@dataclass(frozen=True)
class Objective:
    """What a run minimises.

    Args:
        loss: (scene, views, progress in [0, 1), generator) -> (loss to minimise, its parts for people to read). A part
            named "PRIOR.nonfinite" is the share of a prior's answer that is not finite.
        prepare: (scene, progress, generator) -> the views that a step renders; with what it draws a step begins.
        looks_ahead: whether a GPU may look for the views' samples before their step, see lookahead.py; not where
            views are rendered in parts, whose samples are found again in the backward pass.
    """

    loss: Callable[[Scene, Views, float, torch.Generator], tuple[Tensor, Terms]]
    prepare: Callable[[Scene, float, torch.Generator], Views] = lambda scene, progress, generator: ()
    looks_ahead: bool = True


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
    """What is known after a step. Seconds are wall-clock; `remaining` is an estimate from the latest steps.

    On a GPU `loss`, `terms` and `bad_steps` are those of the step before, NaN and nothing after the first.
    `nonfinite`: the share of each prior's answers that was not finite in the steps taken so far, where it isn't 0.
    """

    stage: str
    step: int
    steps: int
    loss: float
    terms: dict[str, float]
    seconds_per_step: float
    remaining: float
    bad_steps: int
    nonfinite: dict[str, float] = field(default_factory=dict)

    @property
    def warning(self) -> str:
        """The shares that were not finite, for people; "" where there are none."""
        return ", ".join(f"{prior} prior: {share:.3g} % not finite" for prior, share in _percent(self.nonfinite))


@dataclass(frozen=True)
class RunControl:
    """How a run talks to the outside.

    `checkpoint`: file for the unfinished state (None: nothing is saved); if it exists, the run goes on from it
    when its identity equals `identity`, else a ResumeMismatch is raised. `on_step` is called after every step with
    the report and the scene in training (not to be changed); `should_stop` is asked after every step. `team`: the
    processes that share the work; the first one alone writes and calls `on_step`.
    """

    checkpoint: Path | None = None
    identity: dict = field(default_factory=dict)
    on_step: Callable[[StepReport, Scene], None] | None = None
    should_stop: Callable[[], bool] | None = None
    clock: Callable[[], float] = time.monotonic
    team: Team = ALONE

    def stop_if_asked(self, stage: str) -> None:
        """Raise Interrupted where a run is asked to stop before its first step.

        Of several processes none does: the others would wait for it; they stop together, after the first step.
        """
        if self.team.count == 1 and self.should_stop is not None and self.should_stop():
            raise Interrupted(stage, 0, None)


@dataclass(frozen=True)
class FitSummary:
    """`seconds_per_step` is the median of the steps taken now (not those before a resume); `nonfinite`: see StepReport.

    `final_loss` is NaN where no step was taken.
    """

    steps: int
    seconds: float
    seconds_per_step: float
    bad_steps: int
    resumed_from: int
    final_loss: float
    nonfinite: dict[str, float] = field(default_factory=dict)


def _percent(shares: dict[str, float]) -> list[tuple[str, float]]:
    return [(prior, 100 * share) for prior, share in sorted(shares.items())]


ParameterGroup = tuple[str, list[nn.Parameter], float]
"""(name, parameters, learning rate)."""


def make_optimizer(groups: list[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Build Adam or AdamW with one group per kind of parameter; empty groups are left out."""
    listed = [{"name": n, "params": params, "lr": rate, "initial_lr": rate} for n, params, rate in groups if params]
    if not listed:
        raise ValueError("nothing to train: every parameter group is empty")
    # fused: one kernel for all, and one that leaves everything alone where a gradient was not finite
    given = {"betas": config.betas, "eps": config.eps, "fused": listed[0]["params"][0].is_cuda or None}
    if config.name == "adam":
        return torch.optim.Adam(listed, **given)
    return torch.optim.AdamW(listed, weight_decay=config.weight_decay, **given)


def _set_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig, progress: float) -> None:
    factor = milestones(progress, config.milestones, config.factor)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


@dataclass(frozen=True)
class _Found:
    """What a step found, on its way from the device: [loss, 1 where the parameters were changed, *terms]."""

    values: Fetched
    names: tuple[str, ...]

    def read(self) -> tuple[float, bool, dict[str, float]]:
        """(loss, whether the parameters were changed, terms); waits for the step if it has to."""
        loss, good, *terms = self.values.read()
        return loss, bool(good), dict(zip(self.names, terms, strict=True))


def _found(loss: Tensor, good: Tensor, terms: Terms) -> _Found:
    """Gather what a step found; on a GPU its way to the CPU is only begun here."""
    scalars = [loss.detach(), good, *terms.values()]
    dtype = torch.float32 if loss.device.type == "cuda" else torch.float64
    return _Found(fetch(torch.stack([s.detach().to(dtype) for s in scalars])), tuple(terms))


def _take_step(
    scene: Scene,
    loss_of: Callable[[], tuple[Tensor, Terms]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    team: Team,
    meanwhile: Callable[[], None],
) -> _Found:
    """Take one step; where something is not finite, no parameter changes. `meanwhile` is called before the way back."""
    device_type = scene.device.type
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(device_type, dtype=torch.float16, enabled=scaler.is_enabled()):
        loss, terms = loss_of()
    meanwhile()
    answered = _answered(terms, loss.device)
    if loss.requires_grad:
        # a loss that is not finite, or lacks a prior's part, shall leave no finite gradient behind
        spoilt = torch.where(loss.detach().isfinite() & answered, 1.0, float("nan"))
        scaler.scale(loss * spoilt).backward()
    gradients = _gradients(optimizer)
    team.average(gradients)
    if not gradients:
        return _found(loss, torch.zeros((), device=loss.device), terms)
    # norms, not sums: Adam squares what it is given
    finite = torch.isfinite(torch.stack([torch.linalg.vector_norm(g) for g in gradients])).all()
    if scaler.is_enabled():  # the scaler looks for infinities itself and skips the step
        one = torch.ones((), device=loss.device)
        scale = scaler.scale(one)
        scaler.step(optimizer)
        scaler.update()
        scaler.update(torch.where(answered, scaler.scale(one), scale))  # no prior's silence is about the scale
    elif device_type == "cuda":
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif finite:
        optimizer.step()
    return _found(loss, finite.float(), terms)


def _answered(terms: Terms, device: torch.device) -> Tensor:
    """Whether all priors gave an answer, on the device."""
    shares = [value for name, value in terms.items() if _silent_prior(name)]
    if not shares:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack([share.detach().float() for share in shares]).max() <= MOST_NONFINITE


def _silent_prior(term: str) -> str | None:
    """The prior whose share of values that are not finite a term is, or None."""
    prior, _, name = term.rpartition(".")
    return prior if name == NONFINITE else None


def _resume(control: RunControl, steps: int, scene: Scene, optimizer, generator, scaler) -> int:
    """Load the unfinished state if there is one; return the number of steps it has behind it."""
    if control.checkpoint is None or not control.checkpoint.exists():
        return 0
    saved = load_checkpoint(control.checkpoint)
    difference = first_difference(control.identity, saved.identity)
    if difference:
        raise ResumeMismatch(f"{difference}: resume with the same settings, or start over in another folder")
    check_state(saved, control.checkpoint, steps, scene, optimizer, generator)
    unpack_state(saved.tensors, scene, optimizer, generator, scaler)
    return saved.step


def fit(
    scene: Scene,
    objective: Objective,
    groups: list[ParameterGroup],
    *,
    stage: str,
    steps: int,
    optimizer_config: OptimizerConfig,
    loop: LoopConfig,
    generator: torch.Generator,
    control: RunControl,
) -> FitSummary:
    """Minimise the objective over the parameters of `groups`, in place.

    Raises Interrupted when asked to stop (after saving), TrainingDiverged after `loop.max_bad_steps` steps in a
    row without a finite gradient, or PriorSilent after a few without an answer of a prior (what was saved before is
    kept), ResumeMismatch when the checkpoint belongs to other settings, CheckpointError when it is damaged, WriteError
    when it can't be written.
    """
    if steps < 1:
        raise ValueError(f"a run needs at least one step, got {steps}")
    device, team = scene.device, control.team
    optimizer = make_optimizer(groups, optimizer_config)
    scaler = torch.amp.GradScaler(device.type, enabled=loop.precision == "half" and device.type == "cuda")
    start = _resume(control, steps, scene, optimizer, generator, scaler)
    clock, durations = control.clock, deque(maxlen=50)
    began = saved_at = clock()
    seen = _Seen(stage, loop.max_bad_steps, lag=1 if device.type == "cuda" else 0)
    ahead = LookAhead(scene, generator, scaler.is_enabled(), objective.looks_ahead and device.type == "cuda")

    def begin(step: int) -> Views:
        if step % loop.occupancy_every == 0:
            scene.update_occupancy(step, generator)
        return objective.prepare(scene, step / steps, generator)

    def begin_next(step: int) -> None:
        if step + 1 < steps:
            ahead.begin(partial(begin, step + 1))

    def save(done: int) -> None:
        if control.checkpoint is not None and team.writes:
            ahead.undo()
            state = pack_state(scene, optimizer, generator, scaler)
            broken = not_finite(state)
            if broken is not None:  # no run could go on from it
                raise TrainingDiverged(
                    f"{stage}: {broken} is not finite after step {done}: lower the learning rates or the guidance scale"
                )
            save_checkpoint(control.checkpoint, Checkpoint(done, control.identity, state))

    for step in range(start, steps):
        step_began = clock()
        progress = step / steps
        _set_rates(optimizer, optimizer_config, progress)
        loss_of = partial(objective.loss, scene, ahead.views(partial(begin, step)), progress, generator)
        seen.add(step, _take_step(scene, loss_of, optimizer, scaler, team, partial(begin_next, step)))
        done, now = step + 1, clock()
        durations.append(now - step_began)
        if control.on_step is not None and team.writes:
            pace = sum(durations) / len(durations)
            control.on_step(
                StepReport(
                    stage,
                    done,
                    steps,
                    seen.loss,
                    seen.terms,
                    pace,
                    pace * (steps - done),
                    seen.bad_steps,
                    seen.nonfinite,
                ),
                scene,
            )
        stop = done < steps and control.should_stop is not None and control.should_stop()
        stop = team.any(stop)
        due = done % loop.checkpoint_steps == 0 or now - saved_at > loop.checkpoint_seconds
        if stop or (due and not seen.silent):  # nothing new is to be saved while a prior is silent
            save(done)
            saved_at = clock()
        if stop:
            raise Interrupted(stage, done, control.checkpoint)
    seen.finish()
    if start == 0 and not scaler.is_enabled():  # a short run may end before its loss scale fits
        seen.check_all()
    if start < steps:
        save(steps)
    pace = median(durations) if durations else 0.0
    return FitSummary(steps, clock() - began, pace, seen.bad_steps, start, seen.loss, seen.nonfinite)


class _Seen:
    """What is known of the steps so far; the latest `lag` of them are not read yet."""

    def __init__(self, stage: str, max_bad_steps: int, lag: int) -> None:
        self.stage, self.max_bad_steps, self.lag = stage, max_bad_steps, lag
        self.loss, self.terms, self.bad_steps = float("nan"), {}, 0
        self._waiting: deque[tuple[int, _Found]] = deque()
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

    def add(self, step: int, found: _Found) -> None:
        """A step was taken: read those that are old enough."""
        self._waiting.append((step, found))
        while len(self._waiting) > self.lag:
            self._read(*self._waiting.popleft())

    def finish(self) -> None:
        """Read all that is left."""
        while self._waiting:
            self._read(*self._waiting.popleft())

    def check_all(self) -> None:
        """Raise where no step at all has changed anything."""
        if self._silent_run == self._n_steps:
            raise self._silent(self._n_steps - 1)
        if self.bad_steps == self._n_steps:
            raise self._diverged(self._n_steps - 1)

    def _read(self, step: int, found: _Found) -> None:
        self.loss, good, self.terms = found.read()
        self._n_steps += 1
        shares = {prior: share for name, share in self.terms.items() if (prior := _silent_prior(name)) is not None}
        for prior, share in shares.items():
            self._nonfinite[prior] = self._nonfinite.get(prior, 0.0) + share
        silent = any(share > MOST_NONFINITE for share in shares.values())
        self._silent_run = self._silent_run + 1 if silent else 0
        self.bad_steps, self._bad_run = self.bad_steps + (not good), 0 if good else self._bad_run + 1
        if self._silent_run > MOST_SILENT_STEPS:
            raise self._silent(step)
        if self._bad_run > self.max_bad_steps:
            raise self._diverged(step)

    def _silent(self, step: int) -> PriorSilent:
        shares = {prior: share for name, share in self.terms.items() if (prior := _silent_prior(name)) is not None}
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
