"""The training loop, in the open: one for both stages.

A step is: look at the scene, let the supervisions judge it, step the optimiser, report, save. What is random in a step
follows from its number (see randomness.py), so a run is a function of its settings.

On a GPU nothing of this waits for the GPU: what a step found is read while the next one runs, whether its gradient was
finite is decided where it is, and the next step's samples are found ahead of the backward pass (see prefetch.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor

from ..guidance.distillation import NONFINITE
from ..randomness import Draw
from ..scene import Scene
from ..schedules import milestones
from ..supervision import Terms, supervise, views_of
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
from .config import OptimizerConfig
from .plan import fit_into
from .prefetch import Prefetch
from .processes import SINGLE, Processes
from .stages import GuidanceOf, ParameterGroup, Stage

ALL_CELLS_UNTIL = 256
"""Updates of the occupancy look at every cell before this step, then at a random quarter."""
MOST_NONFINITE = 0.01
"""A step changes nothing where more of a prior's answer is not finite."""
MOST_SILENT_STEPS = 5
"""So many such steps in a row a run bears."""


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
    """What is known after a step.

    On a GPU `loss`, `terms` and `bad_steps` are those of the step before, NaN and nothing after the first.
    """

    stage: str
    step: int  # steps done
    steps: int  # of the whole run
    loss: float
    terms: dict[str, float]  # its parts, and what else the supervisions noted
    seconds_per_step: float  # wall-clock
    remaining: float  # seconds, estimated from the latest steps
    bad_steps: int  # that changed nothing, since their gradient was not finite
    nonfinite: dict[str, float] = field(default_factory=dict)  # by prior: share of its answers so far, where not 0

    @property
    def warning(self) -> str:
        """The shares that were not finite, for people; "" where there are none."""
        return ", ".join(f"{prior} prior: {100 * x:.2g} % not finite" for prior, x in sorted(self.nonfinite.items()))


@dataclass(frozen=True)
class RunControl:
    """How a run talks to the outside, and what it may take.

    `checkpoint`: file for the unfinished state (None: nothing is saved); if it exists, the run goes on from it
    when its identity equals `identity`, else a ResumeMismatch is raised. `on_step` is called after every step with
    the report and the scene in training (not to be changed); `should_stop` is asked after every step. `processes`: the
    processes that share the work; the first one alone writes and calls `on_step`. `memory_budget`: bytes of GPU memory
    that the process may take, None for all; `on_plan` is told how it keeps to that.
    """

    checkpoint: Path | None = None
    identity: dict = field(default_factory=dict)
    on_step: Callable[[StepReport, Scene], None] | None = None
    should_stop: Callable[[], bool] | None = None
    clock: Callable[[], float] = time.monotonic
    processes: Processes = SINGLE
    memory_budget: int | None = None
    on_plan: Callable[[str], None] | None = None

    def stop_if_asked(self, stage: str) -> None:
        """Raise Interrupted where a run is asked to stop before its first step.

        Of several processes none does: the others would wait for it; they stop together, after the first step.
        """
        if self.processes.world_size == 1 and self.should_stop is not None and self.should_stop():
            raise Interrupted(stage, 0, None)


@dataclass(frozen=True)
class FitSummary:
    """What a run did."""

    steps: int
    seconds: float
    seconds_per_step: float  # median of the steps taken now, not those before a resume
    bad_steps: int  # see StepReport
    resumed_from: int
    final_loss: float  # NaN where no step was taken
    nonfinite: dict[str, float] = field(default_factory=dict)  # see StepReport


def train(stage: Stage, guidance: GuidanceOf, seed: int, control: RunControl) -> FitSummary:
    """Train a stage's scene in place until its recipe's steps are done.

    Raises Interrupted when asked to stop (after saving), TrainingDiverged after `loop.max_bad_steps` steps in a row
    without a finite gradient, or PriorSilent after a few without an answer of a prior (what was saved before is kept),
    ResumeMismatch when the checkpoint belongs to other settings, CheckpointError when it is damaged, WriteError when it
    can't be written, and a ValueError where the memory budget is too small for any way.
    """
    scene, recipe, loop, steps, processes = (
        stage.scene,
        stage.recipe,
        stage.recipe.loop,
        stage.recipe.steps,
        control.processes,
    )
    if steps < 1:
        raise ValueError(f"a run needs at least one step, got {steps}")
    if control.memory_budget is None:
        supervisions, prefetches = stage.supervisions(guidance, None), True
    else:
        give_up = lambda: control.stop_if_asked(stage.name)  # noqa: E731
        supervisions, prefetches = fit_into(control.memory_budget, guidance, stage, control.on_plan, give_up)
    on_gpu = scene.device.type == "cuda"
    optimizer = make_optimizer(stage.groups, recipe.optimizer)
    scaler = torch.amp.GradScaler(scene.device.type, enabled=loop.precision == "half" and on_gpu)
    prefetch = Prefetch(scene, scaler.is_enabled(), prefetches and on_gpu)
    start = _resume(control, steps, scene, optimizer, scaler)
    seen, durations = _Seen(stage.name, loop.max_bad_steps, lag=1 if on_gpu else 0), deque(maxlen=50)
    began = saved_at = control.clock()
    if start == 0:
        _update_occupancy(scene, seed, 0)

    for step in range(start, steps):
        step_began, progress, draw = control.clock(), step / steps, Draw(seed, step, processes.rank)
        _set_rates(optimizer, recipe.optimizer, progress)
        stage.begin(progress)
        optimizer.zero_grad(set_to_none=True)

        # forward
        views = prefetch.take() or views_of(supervisions, scene, progress, draw)
        with torch.autocast(scene.device.type, dtype=torch.float16, enabled=scaler.is_enabled()):
            terms = supervise(supervisions, scene, views, progress, draw)
            loss = sum(terms.losses.values(), start=torch.zeros((), device=scene.device))

        # prefetch, while the GPU works; first of all what is known of empty space is brought up to date for it
        done = step + 1
        occupancy_due = done < steps and done % loop.occupancy_every == 0
        if occupancy_due and prefetches:
            _update_occupancy(scene, seed, done)
        if prefetch.enabled and done < steps:
            prefetch.begin(views_of(supervisions, scene, done / steps, Draw(seed, done, processes.rank)))

        # backward
        answered = _answered(terms, loss.device)
        _backward(loss, answered, scaler)

        # step, where everything is finite
        finite = _step(optimizer, scaler, answered, processes)
        if occupancy_due and not prefetches:  # the backward pass may have had to find the samples again
            _update_occupancy(scene, seed, done)

        # report
        seen.add(step, _found(loss, finite, terms))
        now = control.clock()
        durations.append(now - step_began)
        if control.on_step is not None and processes.is_main:
            control.on_step(seen.report(done, steps, fmean(durations)), scene)

        # save
        stop = processes.any(done < steps and control.should_stop is not None and control.should_stop())
        due = done % loop.checkpoint_steps == 0 or now - saved_at > loop.checkpoint_seconds
        if stop or (due and not seen.silent):  # nothing new is to be saved while a prior is silent
            _save(control, stage.name, done, pack_state(scene, optimizer, scaler))
            saved_at = control.clock()
        if stop:
            raise Interrupted(stage.name, done, control.checkpoint)

    seen.finish()
    if start == 0 and not scaler.is_enabled():  # a short run may end before its loss scale fits
        seen.check_all()
    if start < steps:
        _save(control, stage.name, steps, pack_state(scene, optimizer, scaler))
    pace = median(durations) if durations else 0.0
    return FitSummary(steps, control.clock() - began, pace, seen.bad_steps, start, seen.loss, seen.nonfinite)


def _update_occupancy(scene: Scene, seed: int, step: int) -> None:
    scene.update_occupancy(Draw(seed, step).for_("occupancy"), all_cells=step < ALL_CELLS_UNTIL)


def make_optimizer(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
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


def _answered(terms: Terms, device: torch.device) -> Tensor:
    """Whether all priors gave an answer, on the device."""
    shares = [value for name, value in terms.notes.items() if _silent_prior(name)]
    if not shares:
        return torch.ones((), dtype=torch.bool, device=device)
    return torch.stack([share.detach().float() for share in shares]).max() <= MOST_NONFINITE


def _silent_prior(note: str) -> str | None:
    """The prior whose share of values that are not finite a note is, or None."""
    prior, _, name = note.rpartition(".")
    return prior if name == NONFINITE else None


def _backward(loss: Tensor, answered: Tensor, scaler: torch.amp.GradScaler) -> None:
    """Leave no finite gradient behind where the loss is not finite, or lacks a prior's part."""
    if loss.requires_grad:
        scaler.scale(loss * torch.where(loss.detach().isfinite() & answered, 1.0, float("nan"))).backward()


def _step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, answered: Tensor, processes: Processes
) -> Tensor:
    """Change the parameters where their gradient is finite, on all processes alike; return whether it is."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    processes.average(gradients)
    if not gradients:
        return torch.zeros((), device=answered.device)
    # norms, not sums: Adam squares what it is given
    finite = torch.isfinite(torch.stack([torch.linalg.vector_norm(g) for g in gradients])).all()
    if scaler.is_enabled():  # the scaler looks for infinities itself and skips the step
        one = torch.ones((), device=answered.device)
        scale = scaler.scale(one)
        scaler.step(optimizer)
        scaler.update()
        scaler.update(torch.where(answered, scaler.scale(one), scale))  # no prior's silence is about the scale
    elif answered.device.type == "cuda":
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif finite:
        optimizer.step()
    return finite.float()


def _resume(control: RunControl, steps: int, scene: Scene, optimizer, scaler) -> int:
    """Load the unfinished state if there is one; return the number of steps it has behind it."""
    if control.checkpoint is None or not control.checkpoint.exists():
        return 0
    saved = load_checkpoint(control.checkpoint)
    difference = first_difference(control.identity, saved.identity)
    if difference:
        raise ResumeMismatch(f"{difference}: resume with the same settings, or start over in another folder")
    check_state(saved, control.checkpoint, steps, scene, optimizer)
    unpack_state(saved.tensors, scene, optimizer, scaler)
    return saved.step


def _save(control: RunControl, stage: str, done: int, state: dict[str, Tensor]) -> None:
    if control.checkpoint is None or not control.processes.is_main:
        return
    broken = not_finite(state)
    if broken is not None:  # no run could go on from it
        raise TrainingDiverged(
            f"{stage}: {broken} is not finite after step {done}: lower the learning rates or the guidance scale"
        )
    save_checkpoint(control.checkpoint, Checkpoint(done, control.identity, state))


# ---- what is known of the steps ----------------------------------------------------------------------------------


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
    named = terms.losses | terms.notes
    dtype = torch.float32 if loss.device.type == "cuda" else torch.float64
    scalars = [s.detach().to(dtype) for s in (loss, good, *named.values())]
    return _Found(fetch(torch.stack(scalars)), tuple(named))


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

    def report(self, done: int, steps: int, pace: float) -> StepReport:
        """What is known after so many steps."""
        left = pace * (steps - done)
        return StepReport(self.stage, done, steps, self.loss, self.terms, pace, left, self.bad_steps, self.nonfinite)

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
        shares = self._shares()
        for prior, share in shares.items():
            self._nonfinite[prior] = self._nonfinite.get(prior, 0.0) + share
        silent = any(share > MOST_NONFINITE for share in shares.values())
        self._silent_run = self._silent_run + 1 if silent else 0
        self.bad_steps, self._bad_run = self.bad_steps + (not good), 0 if good else self._bad_run + 1
        if self._silent_run > MOST_SILENT_STEPS:
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
